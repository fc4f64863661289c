// Times in text and as text. All times are in seconds.

const SECONDS = "(?:s|secs?|seconds?)\\b";
const MINUTES = "(?:m|mins?|minutes?)";
const NUMBER = "\\d+(?:\\.\\d+)?";

// 1:23 and 00:01:23; 2 min 5 s; 12 s, 12.0 seconds; the first number of "12 to 15 s".
const TIME = new RegExp(
  "(?<![\\w.:])(?:" +
    "(?:(?<hours>\\d{1,2}):)?(?<clockMinutes>\\d{1,3}):(?<clockSeconds>[0-5]\\d(?:\\.\\d+)?)(?![\\w:])" +
    `|(?<minutes>\\d+)\\s?${MINUTES}(?:\\s+and)?\\s+(?<rest>${NUMBER})\\s?${SECONDS}` +
    `|(?<seconds>${NUMBER})\\s?${SECONDS}` +
    `|(?<first>${NUMBER})(?=\\s?(?:-|–|to|and)\\s?${NUMBER}\\s?${SECONDS})` +
    ")",
  "gi",
);

/**
 * Splits a text at the times that it names.
 * Returns parts {text, seconds}, whose texts together are the text; `seconds` is null for what is no time, or a time
 * behind `duration`.
 */
export function splitTimes(text, duration = Infinity) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(TIME)) {
    const seconds = secondsOf(match.groups);
    if (seconds === null || seconds > duration) continue;
    if (match.index > end) parts.push({ text: text.slice(end, match.index), seconds: null });
    parts.push({ text: match[0], seconds });
    end = match.index + match[0].length;
  }
  if (end < text.length) parts.push({ text: text.slice(end), seconds: null });
  return parts;
}

function secondsOf(found) {
  if (found.clockSeconds !== undefined) {
    const minutes = Number(found.clockMinutes);
    if (found.hours !== undefined && minutes > 59) return null;
    return Number(found.hours ?? 0) * 3600 + minutes * 60 + Number(found.clockSeconds);
  }
  if (found.minutes !== undefined) return Number(found.minutes) * 60 + Number(found.rest);
  return Number(found.seconds ?? found.first);
}

/** 83.4 as 1:23, 3723 as 1:02:03. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

/** A length of time in words: "8 s", "2 min 5 s", "1 h 10 min". */
export function inWords(seconds) {
  const whole = Math.max(1, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor(whole / 60) % 60} min`;
}

/** The speed of something that is counted, from its latest counts. */
export class Rate {
  #began;
  #seen = [];

  /** `began` is when counting began, in milliseconds. */
  constructor(began) {
    this.#began = [0, began];
  }

  /** Adds the count at a time in milliseconds. */
  add(count, now) {
    this.#seen.push([count, now]);
    if (this.#seen.length > 12) this.#seen.shift();
  }

  /** How many a second; null where that is not known. */
  get perSecond() {
    // What comes before the first count, such as opening the video, matters only while there is no second one.
    const [first, began] = this.#seen.length > 1 ? this.#seen[0] : this.#began;
    const [last, now] = this.#seen.at(-1) ?? this.#began;
    return now > began && last > first ? ((last - first) * 1000) / (now - began) : null;
  }

  /** Seconds until `total` is reached; null where the speed is not known. */
  left(total) {
    return this.perSecond === null ? null : Math.max(0, total - this.#seen.at(-1)[0]) / this.perSecond;
  }
}
