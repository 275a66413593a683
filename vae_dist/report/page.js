"use strict";

const figures = JSON.parse(document.getElementById("figures").textContent);
const config = {
  responsive: true, displaylogo: false, displayModeBar: "hover", showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

/** Plotly lies in the page, compressed. */
async function unpackPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
}

/** The colours of what surrounds the data, from the page's style as it is now. */
function template() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = {
    gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"), tickcolor: colour("--line"),
    automargin: true,
  };
  return {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis, dragmode: "zoom",
      font: { color: colour("--text"), family: getComputedStyle(document.body).fontFamily, size: 13 },
      hoverlabel: { bgcolor: colour("--hover"), bordercolor: colour("--line"), font: { color: colour("--text") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: colour("--accent") },
    },
  };
}

function recolour() {
  for (const name of Object.keys(figures)) Plotly.relayout(name, { template: template() });
}

/** What the x axes of the curves show: images, epochs or minutes. */
function switchAxis(choice) {
  for (const [name, figure] of Object.entries(figures)) {
    if (!figure.data.some((trace) => trace.meta?.axes)) continue;
    Plotly.update(
      name,
      { x: figure.data.map((trace) => trace.meta.axes[choice.value]) },
      { "xaxis.title.text": choice.dataset.title, "xaxis.autorange": true },
    );
  }
}

/** Shows, in the corner of a latent map, the image that is pointed at. */
function showThumbnails(place) {
  const canvas = place.parentElement.querySelector(".thumbnail");
  if (!canvas) return;
  const sheet = document.getElementById(canvas.dataset.sheet);
  const [columns, gap] = [Number(canvas.dataset.columns), Number(canvas.dataset.gap)];
  place.on("plotly_hover", ({ points: [point] }) => {
    const row = Math.floor(point.customdata / columns), column = point.customdata % columns;
    const { width, height } = canvas;
    canvas.getContext("2d").drawImage(sheet, column * (width + gap), row * (height + gap), width, height, 0, 0, width, height);
    canvas.classList.add("seen");
  });
  place.on("plotly_unhover", () => canvas.classList.remove("seen"));
}

/** Of each run the newest picture up to the slider's epoch. */
function slide(slider) {
  const epoch = JSON.parse(slider.dataset.epochs)[Number(slider.value)];
  slider.setAttribute("aria-valuetext", `epoch ${epoch}`);
  for (const figure of slider.closest(".slides").querySelectorAll("figure")) {
    const images = [...figure.querySelectorAll("img")];
    const seen = images.filter((image) => Number(image.dataset.epoch) <= epoch).at(-1) ?? images[0];
    for (const image of images) image.hidden = image !== seen;
    figure.querySelector("output").textContent = seen.dataset.words;
  }
}

async function main() {
  for (const slider of document.querySelectorAll(".slider input")) slider.addEventListener("input", () => slide(slider));
  await unpackPlotly();
  for (const [name, figure] of Object.entries(figures)) {
    await Plotly.newPlot(name, figure.data, { ...figure.layout, template: template() }, config);
    showThumbnails(document.getElementById(name));
  }
  for (const choice of document.querySelectorAll("input[name=axis]")) choice.addEventListener("change", () => switchAxis(choice));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  matchMedia("print").addEventListener("change", recolour);
  document.documentElement.dataset.drawn = "true";
}

main();
