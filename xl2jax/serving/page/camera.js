// A camera of this machine, whose frames go to the server.

import { LiveSocket, Problem, endLive, startLive } from "./api.js";

const LONGEST_SIDE = 640; // pixels of what is sent; the model sees fewer
const QUALITY = 0.85;
const MOST_WAITING = 1 << 20; // bytes that wait to be sent, beyond which frames are left out
const RETRIES = [1000, 2000, 4000, 8000]; // milliseconds before each new attempt

const REFUSALS = {
  NotAllowedError: "The browser may not use the camera. Allow it for this page, and try again.",
  NotFoundError: "No camera was found. Connect one, and try again.",
  NotReadableError: "The camera cannot be used: another program may have it.",
};

/** The camera's pictures. Throws a Problem. */
async function openCamera() {
  if (!navigator.mediaDevices)
    throw new Problem("Browsers give the camera only to pages over https, and to those of this machine.");
  try {
    return await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } }, audio: false });
  } catch (error) {
    throw new Problem(REFUSALS[error.name] ?? `The camera cannot be used (${error.name}).`);
  }
}

export class Camera {
  /** The id of the live video on the server; null before there is one. */
  id = null;
  /** What the server said last: see `progress` in the documentation of the server. */
  progress = null;

  #view;
  #changed;
  #failed;
  #fps;
  #stream = null;
  #socket = null;
  #timer = 0;
  #canvas = document.createElement("canvas");
  #attempts = 0;
  #running = 0; // changes whenever the camera is started or stopped

  /**
   * view: the video element that shows it. fps: frames a second, null for the server's choice. id: that of a live video
   * that goes on. changed(): something new is known. failed(error): the camera was stopped by a Problem.
   */
  constructor({ view, fps, id, changed, failed }) {
    [this.#view, this.#fps, this.id, this.#changed, this.#failed] = [view, fps, id, changed, failed];
  }

  get on() {
    return this.#stream !== null;
  }

  /** Starts the camera, and goes on with its live video, or begins one. Throws a Problem. */
  async start() {
    const run = ++this.#running;
    const stream = await openCamera();
    if (run !== this.#running) return stopTracks(stream);
    this.#stream = stream;
    this.#view.srcObject = stream;
    for (const track of stream.getTracks()) {
      track.addEventListener("ended", () => {
        if (run === this.#running) this.#fail(new Problem("The camera was disconnected."));
      });
    }
    try {
      await this.#view.play();
      if (this.id === null) {
        const about = await startLive(this.#fps === null ? {} : { fps: this.#fps });
        if (run !== this.#running) return endLive(about.id); // it was stopped meanwhile
        this.id = about.id;
        this.#fps = about.settings.fps;
      }
    } catch (error) {
      if (run !== this.#running) return;
      this.stop();
      throw error;
    }
    this.#attempts = 0;
    this.#connect(run);
    this.#timer = setInterval(() => this.#send(), 1000 / (this.#fps ?? 1));
    this.#changed();
  }

  /** Stops the camera. What was seen can still be asked about. */
  stop() {
    this.#running++;
    clearInterval(this.#timer);
    this.#socket?.close();
    if (this.#stream) stopTracks(this.#stream);
    this.#view.srcObject = this.#stream = this.#socket = null;
  }

  /** Stops it, and lets the server forget what was seen. */
  end() {
    this.stop();
    if (this.id !== null) endLive(this.id);
  }

  #fail(problem) {
    this.stop();
    this.#failed(problem);
  }

  #connect(run) {
    this.#socket = new LiveSocket(this.id, {
      onProgress: (progress) => {
        this.#attempts = 0;
        this.progress = progress;
        this.#changed();
      },
      onEnd: (problem, isLost) => {
        if (run !== this.#running) return;
        if (!isLost || this.#attempts === RETRIES.length) this.#fail(problem);
        else setTimeout(() => run === this.#running && this.#connect(run), RETRIES[this.#attempts++]);
      },
    });
  }

  #send() {
    const { videoWidth: width, videoHeight: height } = this.#view;
    if (!width || !this.#socket.isOpen || this.#socket.waiting > MOST_WAITING) return;
    const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
    [this.#canvas.width, this.#canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    this.#canvas.getContext("2d").drawImage(this.#view, 0, 0, this.#canvas.width, this.#canvas.height);
    const [seconds, socket] = [performance.now() / 1000, this.#socket];
    this.#canvas.toBlob((image) => image && socket?.send(seconds, image), "image/jpeg", QUALITY);
  }
}

function stopTracks(stream) {
  for (const track of stream.getTracks()) track.stop();
}
