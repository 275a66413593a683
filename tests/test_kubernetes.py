"""The manifests in launch/kubernetes: right by the schemas of Kubernetes and Kubeflow, of one mind, with options that exist.

The models of Kubeflow Trainer's API, which the tests' environment has, cover all but PyTorchJob. `make test-launch` brings the
schemas of Kubernetes itself and the models of the older Training Operator.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubeflow_trainer_api.models as trainer_models
import pytest
import yaml

from tests.helpers import ROOT
from vae_dist import __version__
from vae_dist.options import parse

MANIFESTS = {path.stem: list(yaml.safe_load_all(path.read_text())) for path in (ROOT / "launch" / "kubernetes").glob("*.yaml")}
DOCUMENTS = {f"{file}-{document['kind']}": document for file, documents in MANIFESTS.items() for document in documents}
MODELS = {
    "Service": "IoK8sApiCoreV1Service",
    "PersistentVolumeClaim": "IoK8sApiCoreV1PersistentVolumeClaim",
    "Job": "IoK8sApiBatchV1Job",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "TrainJob": "TrainerV1alpha1TrainJob",
}
OF_KUBERNETES = ["Service", "PersistentVolumeClaim", "Job"]


def pod_templates(value: Any) -> Iterator[dict[str, Any]]:
    """All pod templates in a document."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from pod_templates(part)


def read_back(document: dict[str, Any], model: str) -> Any:
    """What a model of the API understands of a document: it drops what it does not know, and refuses other types."""
    return getattr(trainer_models, model).from_dict(document).to_dict()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_manifest_is_what_the_api_reads(name: str) -> None:
    document = DOCUMENTS[name]
    if document["kind"] in MODELS:
        assert read_back(document, MODELS[document["kind"]]) == document
    for template in pod_templates(document):
        assert read_back(template, "IoK8sApiCoreV1PodTemplateSpec") == template


def test_an_unknown_field_and_a_wrong_type_are_found_out() -> None:
    job = yaml.safe_load(yaml.safe_dump(DOCUMENTS["job-Job"]))
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 120
    assert read_back(job, "IoK8sApiBatchV1Job") != job
    job["spec"]["completions"] = "two"
    with pytest.raises(ValueError, match="completions"):
        read_back(job, "IoK8sApiBatchV1Job")


@pytest.mark.parametrize("version", ["1.31", "newest"])
@pytest.mark.parametrize("name", [name for name, document in DOCUMENTS.items() if document["kind"] in OF_KUBERNETES])
def test_a_manifest_fits_the_schema_of_kubernetes(name: str, version: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="make test-launch has the schemas of Kubernetes")
    version = schemas.latest_version() if version == "newest" else version
    schemas.validate(DOCUMENTS[name], version, strict=True)
    with pytest.raises(schemas.ValidationError):
        schemas.validate({**DOCUMENTS[name], "specs": {}}, version, strict=True)


@pytest.mark.parametrize("name", [name for name, document in DOCUMENTS.items() if document["kind"] not in OF_KUBERNETES])
def test_pods_of_kubeflow_fit_the_schema_of_kubernetes(name: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="make test-launch has the schemas of Kubernetes")
    for template in pod_templates(DOCUMENTS[name]):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        schemas.validate(pod, "1.31", strict=True)


def misfits(value: Any, kind: str, path: str) -> Iterator[str]:
    """Where a value is not of a kind, in the words of the Training Operator's models: `dict(str, V1PodSpec)`."""
    if found := re.fullmatch(r"(list|dict)[\[(](?:str, )?(.+)[\])]", kind):
        if type(value).__name__ != found[1]:
            yield f"{path}: {value!r} is no {found[1]}"
            return
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from misfits(part, found[2], f"{path}.{key}")
    elif kind in ("str", "int", "bool", "float"):
        if type(value).__name__ != kind:
            yield f"{path}: {value!r} is no {kind}"
    elif kind not in ("object", "datetime"):
        package = "kubeflow.training.models" if kind.startswith("Kubeflow") else "kubernetes.client.models"
        model = getattr(importlib.import_module(package), kind)
        fields = {written: model.openapi_types[name] for name, written in model.attribute_map.items()}
        for name, part in value.items():
            if name not in fields:
                yield f"{path}.{name}: unknown"
            else:
                yield from misfits(part, fields[name], f"{path}.{name}")


def test_the_pytorchjob_is_what_its_operator_reads() -> None:
    pytest.importorskip("kubeflow.training.models", reason="make test-launch has the models of the Training Operator")
    job = DOCUMENTS["pytorchjob-PyTorchJob"]
    assert list(misfits(job, "KubeflowOrgV1PyTorchJob", "job")) == []
    job["spec"] = job["spec"] | {"nprocPerNodes": "gpu", "nprocPerNode": 1}
    assert list(misfits(job, "KubeflowOrgV1PyTorchJob", "job")) == [
        "job.spec.nprocPerNode: 1 is no str",
        "job.spec.nprocPerNodes: unknown",
    ]


PODS = [template["spec"] for document in DOCUMENTS.values() for template in pod_templates(document)]


@pytest.mark.parametrize("pod", PODS, ids=range(len(PODS)))
def test_pods_are_of_one_mind(pod: dict[str, Any]) -> None:
    """One image, of this version; storage, shared memory and the key; and time enough to leave a checkpoint."""
    [container] = pod["containers"]
    assert container["image"] == f"registry.example/vae_dist:{__version__}"
    [seconds] = re.findall(r"--shutdown-timeout=(\d+)", (ROOT / "launch" / "node.sh").read_text())
    assert pod["terminationGracePeriodSeconds"] > int(seconds)
    assert {volume["name"]: volume for volume in pod["volumes"]}["storage"]["persistentVolumeClaim"] == {
        "claimName": MANIFESTS["storage"][0]["metadata"]["name"]
    }
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
        "storage": "/storage",
        "shared-memory": "/dev/shm",
    }
    [key] = [entry for entry in container["env"] if entry["name"] == "WANDB_API_KEY"]
    assert key["valueFrom"]["secretKeyRef"] == {"name": "wandb", "key": "api-key", "optional": True}


def containers(file: str) -> list[dict[str, Any]]:
    """What names arguments and resources in a file: containers, or a TrainJob's trainer."""
    if file == "trainjob":
        trainer = MANIFESTS[file][1]["spec"]["trainer"]
        return [{**trainer, "resources": trainer["resourcesPerNode"]}]
    return [container for template in pod_templates(MANIFESTS[file]) for container in template["spec"]["containers"]]


@pytest.mark.parametrize("file", ["job", "trainjob", "pytorchjob"])
def test_a_manifest_asks_for_a_run_that_can_be_had(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for container in containers(file):
        folder, *options = container["args"]
        config = parse([*options, "--output", folder])
        assert Path(config.data.root).is_relative_to("/storage")
        assert Path(config.output).is_relative_to("/storage")
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1


def test_a_job_has_as_many_pods_as_torchrun_waits_for() -> None:
    service, job = MANIFESTS["job"]
    spec = job["spec"]
    env = {entry["name"]: entry.get("value") for entry in spec["template"]["spec"]["containers"][0]["env"]}
    assert env["PET_NNODES"] == str(spec["completions"]) == str(spec["parallelism"])
    assert env["PET_MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
