// Small pictures of a video, taken in the browser.

const HEIGHT = 96;
const PATIENCE_MS = 10_000;

/** Waits for an event of a media element. Throws where it fails, is stopped or takes too long. */
function once(element, name, signal) {
  return new Promise((resolve, reject) => {
    const ended = AbortSignal.any([signal, AbortSignal.timeout(PATIENCE_MS)]);
    element.addEventListener(name, resolve, { once: true, signal: ended });
    element.addEventListener("error", () => reject(new Error("not playable")), { once: true, signal: ended });
    ended.addEventListener("abort", () => reject(ended.reason), { once: true });
  });
}

/**
 * Yields {number, canvas} for frames of the video at `src` at even distances.
 * `places` gets the aspect ratio and returns how many there shall be.
 * Throws where the browser cannot play it, or `signal` stops it.
 */
export async function* thumbnails(src, places, signal) {
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  try {
    const loaded = once(video, "loadeddata", signal);
    video.src = src;
    await loaded;
    const aspect = video.videoWidth / video.videoHeight;
    const count = places(aspect);
    for (let number = 0; number < count; number++) {
      const seeked = once(video, "seeked", signal);
      video.currentTime = (video.duration * (number + 0.5)) / count;
      await seeked;
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [Math.round(HEIGHT * aspect), HEIGHT];
      canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
      yield { number, canvas };
    }
  } finally {
    video.removeAttribute("src");
    video.load();
  }
}
