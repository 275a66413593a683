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
    automargin: true, title: { standoff: 6 },
  };
  return {
    layout: {
      paper_bgcolor: colour("--page"), plot_bgcolor: colour("--page"), xaxis: axis, yaxis: axis,
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a swipe on a figure scrolls the page
      font: {
        color: colour("--text"), family: getComputedStyle(document.body).fontFamily,
        size: matchMedia("print").matches ? 18 : 13, // a sheet of paper makes figures small
      },
      hoverlabel: { bgcolor: colour("--hover"), bordercolor: colour("--line"), font: { color: colour("--text") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: colour("--accent") },
    },
  };
}

/** After a figure is drawn: its size, by which the page's style fits it to any paper. */
function keepSize(place) {
  const { width, height } = place._fullLayout;
  place.style.aspectRatio = `${width} / ${height}`;
  for (const drawing of place.querySelectorAll(".main-svg")) drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const button of place.querySelectorAll(".modebar-btn")) button.tabIndex = -1; // sixty stops of the Tab key
}

async function draw(name, figure) {
  const place = document.getElementById(name);
  const saved = { filename: place.getAttribute("aria-label"), scale: 2 };
  await Plotly.newPlot(place, figure.data, { ...figure.layout, template: template() }, { ...config, toImageButtonOptions: saved });
  place.on("plotly_afterplot", () => keepSize(place));
  keepSize(place);
  showThumbnails(place);
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
  for (const [name, figure] of Object.entries(figures)) await draw(name, figure);
  for (const choice of document.querySelectorAll("input[name=axis]")) choice.addEventListener("change", () => switchAxis(choice));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  matchMedia("print").addEventListener("change", recolour);
  document.documentElement.dataset.drawn = "true";
}

/** Where the figures would be, why they are not. */
function apologise(error) {
  for (const place of document.querySelectorAll(".plot:empty")) {
    place.textContent = `This browser cannot draw the figure (${error.message}): it takes one of 2023 or later.`;
    place.classList.add("missing");
  }
}

main().catch(apologise);
