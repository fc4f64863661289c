// The camera as the video: what it sees, how much of it the server has seen, and a button that stops and starts it.

import { endLive } from "./api.js";
import { Camera } from "./camera.js";
import { clock } from "./times.js";

export class LivePanel {
  /** Resolves when the server has seen something, and is rejected where the camera fails before that. */
  ready = Promise.resolve();

  #root;
  #view;
  #words;
  #toggle;
  #page;
  #camera = null;
  #id = null;
  #seen = null;

  /**
   * root, view: elements of the words and the button, and of the picture. page: what the panel needs of it.
   * fps(): frames a second, or null. announce(text). failed(error): null where nothing is wrong any more.
   * begun(id): the server has this live video now; null where it has none any more.
   */
  constructor(root, view, page) {
    [this.#root, this.#view, this.#page] = [root, view, page];
    [this.#words, this.#toggle] = [root.querySelector("p"), root.querySelector("button")];
    this.#toggle.addEventListener("click", () => (this.#camera?.on ? this.#stop() : this.start()));
  }

  /** Shows the panel, for a new live video or for one that goes on. */
  open(id = null) {
    this.#root.hidden = this.#view.hidden = false;
    this.#id = id;
    this.#draw(id === null ? "" : "The camera is off. Start it to go on.");
  }

  /** Hides it. The server forgets what was seen. */
  close() {
    this.#root.hidden = this.#view.hidden = true;
    this.#camera?.end();
    if (this.#camera === null && this.#id !== null) endLive(this.#id);
    this.#camera = this.#id = null;
    this.ready = Promise.resolve();
  }

  /** Starts the camera. Questions wait until something was seen. */
  async start() {
    this.#page.failed(null);
    const camera = (this.#camera ??= this.#newCamera());
    const before = this.#seen;
    this.ready = new Promise((resolve, reject) => (this.#seen = { resolve, reject }));
    before?.resolve(this.ready); // a question that waited for the camera before waits for this one
    this.ready.catch(() => {}); // where nobody asks, the panel's error is enough
    this.#draw("Starting the camera…");
    this.#page.announce("Starting the camera…");
    try {
      await camera.start();
      if (camera !== this.#camera || !camera.on) return;
      this.#id = camera.id;
      this.#page.begun(camera.id);
      this.#page.announce("The server watches the camera. Ask about what it sees.");
    } catch (error) {
      if (camera === this.#camera) this.#fail(error);
    }
  }

  #newCamera() {
    const camera = new Camera({
      view: this.#view,
      fps: this.#page.fps(),
      id: this.#id,
      changed: () => {
        if (camera !== this.#camera) return;
        if (camera.progress?.frames) this.#seen.resolve();
        this.#draw();
      },
      failed: (error) => camera === this.#camera && this.#fail(error),
    });
    return camera;
  }

  #stop() {
    this.#camera.stop();
    this.#draw();
    this.#page.announce("The camera is off. You can still ask about what was seen.");
  }

  #fail(error) {
    this.#seen.reject(error);
    if (error.status === 404) {
      this.#camera = this.#id = null; // the next one begins anew
      this.#page.begun(null);
    }
    this.#draw();
    this.#page.announce(""); // the error is an alert
    this.#page.failed(error);
  }

  /** Says what the server has seen, or other words. */
  #draw(words = null) {
    const { on, progress } = this.#camera ?? {};
    const parts = [on ? "Watching" : "The camera is off"];
    if (progress) parts.push(`${clock(progress.seconds)} seen`);
    if (progress?.dropped) parts.push(`${progress.dropped} frames dropped`);
    this.#words.textContent = words ?? parts.join(" · ");
    this.#toggle.textContent = on ? "Stop the camera" : "Start the camera";
  }
}
