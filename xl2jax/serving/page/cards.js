// A question and its answer as a card of the conversation.

import { clock, inWords, splitTimes } from "./times.js";

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, className, onClick) {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

/**
 * The text of an answer, with links for the times in it. A model's answer is never read as HTML.
 * `onSeek` gets the time of a link in seconds.
 */
export function linked(text, duration, onSeek) {
  return splitTimes(text, duration).map(({ text, seconds }) => {
    if (seconds === null) return document.createTextNode(text);
    const link = element("a", "time", text);
    link.href = `#t=${seconds}`;
    link.title = `Go to ${clock(seconds)}`;
    link.addEventListener("click", (event) => {
      event.preventDefault();
      onSeek(seconds);
    });
    return link;
  });
}

/**
 * Shows a turn: {question, answer, state, note, error, chunks, whole, reason, seconds}.
 * state: "running", "done", "stopped" or "failed". note: what a running one waits for.
 */
export class Card {
  #turn;
  #answer = element("div", "answer");
  #note = element("p", "note muted");
  #error = element("div", "error");
  #show;
  #again;
  #linked = null; // the text and the duration that the links were made for
  #onSeek;

  constructor(turn, { onSeek, onShow, onAgain }) {
    this.#turn = turn;
    this.#onSeek = onSeek;
    this.#error.setAttribute("role", "alert");
    this.#show = button("Show on timeline", "small quiet", onShow);
    this.#again = button("Ask again", "small", onAgain);
    const foot = element("div", "foot");
    foot.append(this.#note, this.#again, this.#show);
    this.element = element("li", "turn");
    this.element.append(element("p", "question", turn.question), this.#answer, this.#error, foot);
  }

  /** Draws the turn as it is now. `duration` is that of the video, `selected` whether the timeline shows this turn. */
  update(duration, selected) {
    const turn = this.#turn;
    const running = turn.state === "running";
    this.element.dataset.state = turn.state;
    this.element.classList.toggle("selected", selected);
    this.#answer.hidden = !turn.answer;
    // Links come with the end of the answer, and are not made anew without need: a replaced link loses the focus.
    const toLink = `${duration} ${turn.answer}`;
    if (running) this.#answer.textContent = turn.answer;
    else if (this.#linked !== toLink) {
      this.#answer.replaceChildren(...linked(turn.answer, duration, this.#onSeek));
      this.#linked = toLink;
    }
    this.#error.hidden = !turn.error;
    if (this.#error.textContent !== (turn.error ?? "")) this.#error.textContent = turn.error ?? "";
    this.#note.textContent = running ? turn.note : this.#summary();
    this.#again.hidden = turn.state !== "failed" && turn.state !== "stopped";
    this.#show.hidden = turn.state !== "done";
    this.#show.setAttribute("aria-pressed", String(selected));
    this.#show.textContent = selected ? "On timeline" : "Show on timeline";
  }

  #summary() {
    const { state, seconds, chunks, whole, reason } = this.#turn;
    if (state === "stopped") return "Stopped.";
    if (state === "failed") return "";
    const words = this.#turn.answer ? [] : ["no text"];
    if (whole) words.push("read densely");
    else if (chunks.length)
      words.push(`${chunks.filter((chunk) => chunk.dense).length} of ${chunks.length} chunks dense`);
    words.push(seconds < 10 ? `${seconds.toFixed(1)} s` : inWords(seconds));
    if (reason === "length") words.push("cut off at its longest length");
    return words.map((word) => word.replaceAll(" ", "\u00a0")).join(" · ");
  }
}
