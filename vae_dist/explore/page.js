// The page: sliders and pad set the latents, the server decodes them.

import { Channel, ask, paint } from "./live.js";
import { Pad } from "./pad.js";

const SHOWN_FIRST = 12; // sliders
const STEPS = 11; // between two images, with them
const REACH = 4; // of a slider, in standard deviations of the prior; further where a picture's posterior lies further out
const at = (id) => document.getElementById(id);

let told = 0; // when the last words were

const model = await ask("model").catch((error) => report(error.message));

/** What went wrong; or "", and how long a change took that went well, which ends what was said before it. */
function report(words, milliseconds) {
  const now = performance.now();
  if (milliseconds !== undefined) at("latency").textContent = `${milliseconds.toFixed(0)} ms`;
  if (words === "" && now - (milliseconds ?? 0) < told) return;
  told = now;
  at("trouble").hidden = words === "";
  at("trouble").textContent = words;
}

function begin() {
  const [channels, height, width] = model.shape;
  const noun = model.latent_dim === 1 ? "latent" : "latents";
  at("facts").textContent = `${model.name}: ${model.kind}, ${model.latent_dim} ${noun}, ${channels === 1 ? "grey" : "colour"} images of ${width} × ${height} (${model.data})`;
  document.title = `${model.name} – vae_dist explore`;
  for (const canvas of document.querySelectorAll("canvas")) Object.assign(canvas, { width, height });
  for (const tool of document.querySelectorAll(channels === 1 ? ".coloured" : ".grey")) tool.hidden = true;
  at("brush").max = Math.max(4, Math.round(Math.min(width, height) / 4));
  at("brush").value = Math.max(1, Math.min(width, height) / 12);
  const latents = beginLatents();
  beginDrawing(latents, channels);
  if (model.images > 0) beginBetween();
  at("borrow").hidden = at("way").hidden = model.images === 0;
  at("no-images").hidden = model.images > 0;
  at("no-images").textContent = `There are no test images: ${model.problem}`;
}

/** The sliders. Returns how others set them. */
function beginLatents() {
  const channel = new Channel(report);
  const values = new Array(model.latent_dim).fill(0);
  const rows = new Map(); // by dimension; of those that are shown
  let drawn = null; // the KL by dimension of the picture on the pad, while the latents are its own

  const decode = () => askPicture(values);
  const show = (answer) => paint(at("picture"), answer.pixels);

  function move(dimension, value, since) {
    values[dimension] = value;
    drawn = null;
    refresh();
    channel.put(decode, show, since);
  }

  function set(latents, kl) {
    latents.forEach((value, dimension) => (values[dimension] = value));
    drawn = kl;
    refresh();
  }

  function refresh() {
    const most = Math.max(0.1, ...(model.kl ?? []), ...(drawn ?? []));
    for (const [dimension, row] of rows) row.show(values[dimension], model.kl?.[dimension], drawn?.[dimension], most);
    if (!drawn) at("figures").textContent = "";
  }

  function reveal(count) {
    for (const dimension of model.order.slice(rows.size, count)) {
      const row = new Row(dimension, (value, since) => move(dimension, value, since));
      rows.set(dimension, row);
      at("sliders").append(row.item);
    }
    const left = model.latent_dim - rows.size;
    at("more").hidden = left === 0;
    at("more").textContent = left === 1 ? "Show the last one" : `Show the other ${left}`;
    refresh();
  }

  const sample = () => ask(`sample?seed=${at("seed").value}`);

  function showSample(answer) {
    set(answer.latents, null);
    show(answer);
  }

  at("order").textContent = model.kl
    ? "Those that tell most come first."
    : "In the model's own order: it takes test images to know which tell most.";
  at("mean-key").hidden = !model.kl;
  at("more").addEventListener("click", () => reveal(model.latent_dim));
  at("reset").addEventListener("click", (event) => {
    set(values.map(() => 0), null);
    channel.put(decode, show, event.timeStamp);
  });
  whenNumbered(at("seed"), (event) => channel.put(sample, showSample, event.timeStamp));
  at("random").addEventListener("click", (event) => {
    at("seed").value = at("seed").defaultValue = Math.floor(Math.random() * 10000);
    channel.put(sample, showSample, event.timeStamp);
  });
  reveal(SHOWN_FIRST);
  channel.put(decode, show);
  return { channel, set };
}

/** The slider of a dimension, with its value, its KL over test images, and that of the picture on the pad. */
class Row {
  constructor(dimension, moved) {
    this.item = document.createElement("li");
    this.item.innerHTML = `<label></label><input type="range" step="0.05"><span class="value"></span><span class="kl" role="img"><i class="mean"></i><i class="own"></i></span>`;
    [this.label, this.slider, this.value, this.bars] = this.item.children;
    this.label.textContent = `z${dimension}`;
    this.label.htmlFor = this.slider.id = `z${dimension}`;
    this.slider.title = "Double-click: back to 0";
    this.slider.addEventListener("input", (event) => moved(this.slider.valueAsNumber, event.timeStamp));
    this.slider.addEventListener("dblclick", (event) => moved(0, event.timeStamp));
  }

  /** A value, and KL in nats where it is known; `most` is that of a full bar. */
  show(value, mean, own, most) {
    this.slider.max = Math.max(REACH, Math.ceil(Math.abs(value)));
    this.slider.min = -this.slider.max;
    this.slider.value = value;
    this.value.textContent = value.toFixed(2).replace("-", "−"); // no <output>, which screen readers would read at each change
    const parts = [];
    for (const [bar, kl, name] of [[this.bars.children[0], mean, "test images"], [this.bars.children[1], own, "picture"]]) {
      bar.style.width = `${(100 * (kl ?? 0)) / most}%`;
      if (kl !== undefined) parts.push(`${kl.toFixed(2)} nats (${name})`);
    }
    this.bars.title = `KL: ${parts.join(", ")}`;
  }
}

/** The pad: its picture is encoded while it is drawn, and the latents follow. */
function beginDrawing(latents, channels) {
  const encode = () => ask("encode", pad.pixels());
  let caption = ""; // of the picture on the pad, until it is drawn over

  function show(answer) {
    latents.set(answer.latents, answer.kl);
    paint(at("picture"), answer.pixels);
    const [loss, bce, kld] = [answer.loss, answer.bce, answer.kld].map((nats) => nats.toFixed(1));
    at("figures").textContent = `${caption}Negative ELBO ${loss} nats${answer.note} (bce ${bce} + kld ${kld}), from one latent`;
  }

  const shade = () => `rgb(${at("shade").value} ${at("shade").value} ${at("shade").value})`;
  const brush = () => ({ width: at("brush").valueAsNumber, colour: channels === 1 ? shade() : at("colour").value });
  const pad = new Pad(at("pad"), channels, brush, (since) => {
    at("undo").disabled = !pad.undoable;
    at("hint").hidden = true;
    caption = "";
    latents.channel.put(encode, show, since);
  });
  // Screen readers wait with the figures until the stroke is drawn.
  for (const [kind, isBusy] of [["pointerdown", true], ["pointerup", false], ["pointercancel", false]])
    at("pad").addEventListener(kind, () => at("figures").setAttribute("aria-busy", isBusy));
  for (const name of ["undo", "clear", "invert"]) at(name).addEventListener("click", () => pad[name]());
  at("choose").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", () => {
    openFile(at("file").files);
    at("file").value = ""; // so that the same file may be chosen again
  });
  document.addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (event.dataTransfer.files.length > 0) event.preventDefault(); // or the browser would leave the page for the file
    openFile(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => openFile(event.clipboardData.files));
  at("borrow").addEventListener("click", () => {
    const number = anyImage();
    bring(ask(`image?number=${number}`), (image) => `Test image ${number}${ofClass(image)}. `);
  });

  function openFile([file]) {
    if (file?.size > model.most_bytes) report(`${file.name} has more than ${model.most_bytes / 1e6} MB`);
    else if (file) bring(ask("upload", file), () => `${file.name}. `);
  }

  /** Shows a picture on the pad when it comes, and what `name` calls it. */
  async function bring(answer, name) {
    try {
      const image = await answer;
      pad.show(image.pixels);
      caption = name(image);
    } catch (error) {
      report(error.message);
    }
  }
}

/** Calls `then` when a field gets a number that it may have; any other is refused in words, and the field has its former one. */
function whenNumbered(field, then) {
  field.addEventListener("input", () => report("")); // what was said of the number before
  field.addEventListener("change", (event) => {
    if (!field.checkValidity()) {
      report(`${field.labels[0].textContent}: it must be a whole number in ${field.min} … ${Number(field.max).toLocaleString("en")}`);
      field.value = field.defaultValue;
    } else {
      field.defaultValue = field.value;
      then(event);
    }
  });
}

const askPicture = (latents) => ask("decode", JSON.stringify({ latents }), "application/json");
const ofClass = (image) => (image.label === null ? "" : `, class ${image.label}`);
const anyImage = () => Math.floor(Math.random() * model.images);

/** Two test images, a picture anywhere on the straight line between their posterior means, and steps on that line. */
function beginBetween() {
  const channel = new Channel(report);
  const steps = new Channel((words) => words && report(words));
  const ids = ["first", "second"];
  const ends = []; // number and posterior mean
  const strip = Array.from({ length: STEPS }, () => at("strip").appendChild(at("middle").cloneNode()));
  for (const canvas of strip) canvas.removeAttribute("id");

  const pictureAt = (share) => askPicture(ends[0].latents.map((start, i) => start + share * (ends[1].latents[i] - start)));

  async function picture() {
    for (const [i, id] of ids.entries()) {
      const number = at(id).value;
      if (ends[i]?.number === number) continue;
      const image = await ask(`image?number=${number}`);
      ends[i] = { number, latents: image.latents };
      paint(at(`${id}-image`), image.pixels);
      at(`${id}-class`).textContent = ofClass(image);
      if (ends.length === 2) steps.put(fillStrip, () => {});
    }
    return pictureAt(at("share").valueAsNumber);
  }

  async function fillStrip() {
    for (const [i, canvas] of strip.entries()) paint(canvas, (await pictureAt(i / (STEPS - 1))).pixels);
  }

  const show = (answer) => paint(at("middle"), answer.pixels);
  function changed(event) {
    at("place").textContent = `, ${Math.round(100 * at("share").value)} %`;
    channel.put(picture, show, event?.timeStamp);
  }

  for (const [i, id] of ids.entries()) {
    Object.assign(at(id), { max: model.images - 1, defaultValue: Math.min(i, model.images - 1) });
    whenNumbered(at(id), changed);
    at(`${id}-other`).addEventListener("click", (event) => {
      at(id).value = at(id).defaultValue = anyImage();
      changed(event);
    });
  }
  at("share").addEventListener("input", changed);
  changed();
}

if (model) begin();
