// A pad to draw on.

import { paint } from "./live.js";

const MOST_UNDONE = 50;

/** A canvas of the model's own resolution, so that the edges of a stroke have the greys that the model sees. */
export class Pad {
  #past = [];
  #last = null; // where the stroke under way has come to

  /** `brush()` gives the width in pixels and the colour; `changed(since)` is called after each change. */
  constructor(canvas, channels, brush, changed) {
    Object.assign(this, { canvas, channels, brush, changed });
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.context.lineCap = "round";
    this.#fill("#000");
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#go(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (this.#last = null));
  }

  get undoable() {
    return this.#past.length > 0;
  }

  undo() {
    const before = this.#past.pop();
    if (before) this.context.putImageData(before, 0, 0);
    this.changed();
  }

  clear() {
    this.#remember();
    this.#fill("#000");
    this.changed();
  }

  invert() {
    this.#remember();
    this.context.globalCompositeOperation = "difference";
    this.#fill("#fff");
    this.context.globalCompositeOperation = "source-over";
    this.changed();
  }

  /** A picture as the server writes it. */
  show(written) {
    this.#remember();
    paint(this.canvas, written);
    this.changed();
  }

  /** As the server reads them: row by row, the channels of a pixel side by side. */
  pixels() {
    const { width, height } = this.canvas;
    const shown = this.context.getImageData(0, 0, width, height).data;
    const pixels = new Uint8Array(width * height * this.channels);
    for (let i = 0; i < pixels.length; i++) pixels[i] = shown[4 * Math.floor(i / this.channels) + (i % this.channels)];
    return pixels;
  }

  #begin(event) {
    if (event.button !== 0 || !event.isPrimary) return; // a second finger
    this.canvas.setPointerCapture(event.pointerId);
    this.#remember();
    this.#last = this.#place(event);
    this.#line(event);
  }

  #go(event) {
    if (this.#last && event.isPrimary) this.#line(event);
  }

  #line(event) {
    const { width, colour } = this.brush();
    this.context.lineWidth = width;
    this.context.strokeStyle = colour;
    this.context.beginPath();
    this.context.moveTo(...this.#last);
    const parts = event.getCoalescedEvents?.() ?? []; // a browser has it where the address is this machine's own, or https
    for (const part of [...parts, event]) {
      const [x, y] = (this.#last = this.#place(part));
      this.context.lineTo(x + 1e-3, y); // a line of no length would leave no dot
    }
    this.context.stroke();
    this.changed(event.timeStamp);
  }

  /** Of a pointer, in pixels of the image. */
  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.canvas.width, ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  #fill(colour) {
    this.context.fillStyle = colour;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  #remember() {
    this.#past.push(this.context.getImageData(0, 0, this.canvas.width, this.canvas.height));
    if (this.#past.length > MOST_UNDONE) this.#past.shift();
  }
}
