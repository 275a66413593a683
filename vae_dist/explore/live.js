// Asking the server, without a queue; and painting what it answers.

let mark; // of the model that the page is of

/** The answer to a question; throws an Error with the server's words where it is refused, and where another run's server has come
    to the same address. */
export async function ask(path, body, type = "application/octet-stream") {
  const how = body === undefined ? {} : { method: "POST", body, headers: { "Content-Type": type } };
  let answer;
  try {
    answer = await fetch(path, how);
  } catch {
    throw new Error("the server does not answer; is python -m vae_dist.explore still running?");
  }
  mark ??= answer.headers.get("X-Model");
  if (answer.headers.get("X-Model") !== mark) throw new Error("another model is served here now: reload the page");
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.detail);
  return content;
}

/** One question at a time: of those that come while another is under way only the newest is asked. So no answer comes late
    or out of order, however fast a slider is moved. */
export class Channel {
  #busy = false;
  #next = null;

  /** `report(words, milliseconds)` is called after each answer: with what went wrong, or how long it took from the event. */
  constructor(report) {
    this.report = report;
  }

  /** `question()` asks, `show(answer)` paints, unless another question waits by then; `since` is the time of the event. */
  put(question, show, since = performance.now()) {
    this.#next = { question, show, since };
    if (!this.#busy) this.#run();
  }

  async #run() {
    this.#busy = true;
    while (this.#next) {
      const { question, show, since } = this.#next;
      this.#next = null;
      try {
        const answer = await question();
        if (this.#next && this.#next.question !== question) continue;
        show(answer);
        afterPaint(() => this.report("", performance.now() - since));
      } catch (error) {
        this.report(error.message);
      }
    }
    this.#busy = false;
  }
}

/** A task that is queued in a frame runs when the frame has been painted. */
function afterPaint(then) {
  requestAnimationFrame(() => setTimeout(then));
}

/** Pixels as the server writes them: base64, row by row, the channels of a pixel side by side. */
export function paint(canvas, written) {
  const pixels = Uint8Array.from(atob(written), (character) => character.charCodeAt(0));
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const count = canvas.width * canvas.height, channels = pixels.length / count;
  for (let i = 0; i < count; i++) {
    for (let j = 0; j < 3; j++) image.data[4 * i + j] = pixels[channels * i + (channels === 1 ? 0 : j)];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}
