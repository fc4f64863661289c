// How far an upload or a watching is, in words and as a bar.

import { Rate, inWords } from "./times.js";

function bytes(count) {
  if (count < 1e6) return `${Math.ceil(count / 1e3)} kB`;
  return count < 1e9 ? `${(count / 1e6).toFixed(count < 1e8 ? 1 : 0)} MB` : `${(count / 1e9).toFixed(2)} GB`;
}

/** Counts become words with their speed and the time that is left. */
export class Tracker {
  #rate;

  /** `began` is when it began, and `now` below the time of the count, in milliseconds. */
  constructor(began = performance.now()) {
    this.#rate = new Rate(began);
  }

  watched(frames, total, now = performance.now()) {
    const speed = (perSecond) => `${perSecond < 10 ? perSecond.toFixed(1) : Math.round(perSecond)} frames/s`;
    return this.#words(`Watched ${frames} of ${total} frames`, frames, total, speed, now);
  }

  uploaded(sent, total, now = performance.now()) {
    return this.#words(`Uploaded ${bytes(sent)} of ${bytes(total)}`, sent, total, (n) => `${bytes(n)}/s`, now);
  }

  #words(beginning, count, total, speed, now) {
    this.#rate.add(count, now);
    const words = [beginning];
    if (this.#rate.perSecond !== null && count < total) {
      words.push(speed(this.#rate.perSecond), `${inWords(this.#rate.left(total))} left`);
    }
    return words.join(" · ");
  }
}

/** A bar with words. `announce` gets them at the beginning and at every quarter, and no words at the end. */
export class ProgressBar {
  #words;
  #bar;
  #announce;
  #said = 0;

  constructor(root, announce) {
    this.root = root;
    [this.#words, this.#bar] = [root.querySelector("p"), root.querySelector("progress")];
    this.#announce = announce;
  }

  /** Begins with words for something whose end is not known. */
  wait(words) {
    this.root.hidden = false;
    this.#words.textContent = words;
    this.#bar.removeAttribute("value");
    this.#said = 0;
    this.#announce(words);
  }

  set(words, part) {
    this.#words.textContent = words;
    this.#bar.value = part;
    const quarter = Math.floor(4 * part);
    if (quarter > this.#said) this.#announce(words);
    this.#said = quarter;
  }

  end() {
    this.root.hidden = true;
    this.#announce("");
  }
}
