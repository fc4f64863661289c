// The timeline under the player: thumbnails, and a bar for the relevance of every chunk.

import { clock } from "./times.js";

const TICKS = 5;

export class Timeline {
  #root;
  #strip;
  #bars;
  #axis;
  #head;
  #readout;
  #onSeek;
  #chunks = [];
  #duration = 0;
  #summary = "";

  /** `onSeek` gets the time in seconds that the user chose. */
  constructor(root, onSeek) {
    this.#root = root;
    this.#onSeek = onSeek;
    [this.#strip, this.#bars, this.#axis, this.#head, this.#readout] = [
      "strip",
      "bars",
      "axis",
      "playhead",
      "readout",
    ].map((name) => root.querySelector(`.${name}`));
    this.#strip.addEventListener("click", (event) => {
      const box = this.#strip.getBoundingClientRect();
      onSeek((this.#duration * (event.clientX - box.left)) / box.width);
    });
    this.#bars.addEventListener("keydown", (event) => this.#move(event));
    for (const name of ["focusin", "pointerover"]) {
      this.#bars.addEventListener(name, (event) => this.#describe(event.target));
    }
    for (const name of ["focusout", "pointerleave"]) {
      this.#bars.addEventListener(name, () => this.#describe(document.activeElement));
    }
  }

  /** How long the video is. */
  set duration(seconds) {
    if (!(seconds > 0) || seconds === Infinity) return;
    this.#duration = seconds;
    this.#draw();
  }

  get duration() {
    return this.#duration;
  }

  /** Removes everything. */
  clear() {
    [this.#chunks, this.#duration, this.#summary] = [[], 0, ""];
    this.clearThumbnails();
    this.#draw();
  }

  /** Moves the focus to the chunk of a time. */
  focusAt(seconds) {
    const index = this.#chunks.findLastIndex((chunk) => chunk.start <= seconds);
    if (index < 0) return;
    this.#rove(index);
    this.#bars.children[index].focus();
  }

  clearThumbnails() {
    this.#strip.hidden = true;
    this.#strip.replaceChildren();
  }

  /** Makes empty places for thumbnails, as many of this aspect ratio as fit, and returns their number. */
  makePlaces(aspect) {
    this.#root.hidden = this.#strip.hidden = false;
    const { width, height } = this.#strip.getBoundingClientRect();
    const count = Math.min(24, Math.max(3, Math.round(width / (height * aspect)) || 3));
    this.#strip.replaceChildren(...Array.from({ length: count }, () => document.createElement("span")));
    return count;
  }

  /** Puts a canvas into one of the places. */
  setThumbnail(number, canvas) {
    this.#strip.children[number]?.replaceChildren(canvas);
  }

  /**
   * Shows chunks as the server describes them. `question` names what their relevance is to; without one they are shown
   * without relevance. `whole`: the video was read densely, without chunks.
   */
  show(chunks, question = null, whole = false) {
    if (!this.#duration) this.#duration = chunks.at(-1)?.end ?? 0;
    this.#chunks = whole
      ? [{ number: null, start: 0, end: this.#duration, score: null, dense: true, scored: true }]
      : chunks.map((chunk) => ({ ...chunk, scored: question !== null }));
    this.#bars.setAttribute("aria-label", question === null ? "Chunks of the video" : `Relevance to: ${question}`);
    const dense = this.#chunks.filter((chunk) => chunk.dense).length;
    if (question === null && !chunks.length) this.#summary = "The chunks appear when the video has been watched.";
    else if (question === null) this.#summary = "Ask, and the bars show where the answer comes from.";
    else if (whole) this.#summary = "The whole video was read densely.";
    else this.#summary = `${dense} of ${chunks.length} chunks were read densely for this question.`;
    this.#draw();
  }

  /** Moves the mark of the player's position. */
  set time(seconds) {
    this.#head.hidden = !this.#duration;
    this.#head.style.left = `${(100 * Math.min(seconds, this.#duration)) / (this.#duration || 1)}%`;
  }

  #draw() {
    this.#root.hidden = !this.#duration;
    const top = Math.max(0, ...this.#chunks.map((chunk) => chunk.score ?? 0));
    const focused = [...this.#bars.children].indexOf(document.activeElement);
    this.#bars.replaceChildren(
      ...this.#chunks.map((chunk, index) => {
        const next = this.#chunks[index + 1]?.start ?? Math.max(this.#duration, chunk.end);
        return this.#button(chunk, index, next, top);
      }),
    );
    if (focused >= 0) this.#bars.children[Math.min(focused, this.#chunks.length - 1)]?.focus();
    this.#root.style.setProperty("--chunks", this.#chunks.length);
    this.#axis.replaceChildren(
      ...Array.from({ length: TICKS }, (_, n) => {
        const tick = document.createElement("span");
        tick.textContent = clock((this.#duration * n) / (TICKS - 1));
        return tick;
      }),
    );
    this.#describe(document.activeElement);
  }

  #button(chunk, index, next, top) {
    const button = document.createElement("button");
    button.type = "button";
    button.tabIndex = index === 0 ? 0 : -1;
    const part = chunk.score === null || top === 0 ? 1 : chunk.score / top;
    const times = `${clock(chunk.start)} to ${clock(chunk.end)}`;
    const words = [chunk.number === null ? `Whole video: ${times}` : `Chunk ${chunk.number}: ${times}`];
    if (chunk.scored) {
      words.push(chunk.score === null ? "not scored" : `relevance ${Math.round(100 * part)} %`);
      words.push(chunk.dense ? "dense" : "pooled");
    }
    button.ariaLabel = words.join(", ");
    button.title = words.join(", ");
    button.style.left = `${(100 * chunk.start) / this.#duration}%`;
    button.style.width = `${(100 * (next - chunk.start)) / this.#duration}%`;
    if (chunk.scored) {
      const bar = document.createElement("span");
      bar.className = chunk.dense ? "bar dense" : "bar";
      bar.style.height = `${Math.max(4, 100 * part)}%`;
      button.append(bar);
    }
    button.addEventListener("click", () => {
      this.#rove(index);
      this.#onSeek(chunk.start);
    });
    return button;
  }

  /** Makes one button the one that Tab reaches. */
  #rove(index) {
    [...this.#bars.children].forEach((button, n) => (button.tabIndex = n === index ? 0 : -1));
  }

  #move(event) {
    const buttons = [...this.#bars.children];
    const from = buttons.indexOf(event.target);
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined || !buttons[to]) return;
    event.preventDefault();
    this.#rove(to);
    buttons[to].focus();
  }

  /** Says below the bars what one of them shows. */
  #describe(element) {
    const button = element?.closest?.("button");
    this.#readout.textContent = button && this.#bars.contains(button) ? button.ariaLabel : this.#summary;
  }
}
