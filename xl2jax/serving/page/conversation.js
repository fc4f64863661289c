// The questions about the video and their answers, one at a time.

import { ask, inSentence } from "./api.js";
import { Card } from "./cards.js";
import { Tracker } from "./progress.js";

export class Conversation {
  /** The turns, the oldest first: see Card. */
  turns = [];
  /** The number of the turn that the timeline shows, or -1. */
  selected = -1;

  #cards = [];
  #running = null;
  #page;

  /**
   * page: what the conversation needs of it.
   * list, scroll: elements of the turns and around them. timeline, seek(seconds). announce(text).
   * mayRefer(): whether a question may refer to earlier ones. request(question, earlier): the body of a chat request.
   * ready(): resolves when the server has the video.
   * changed(): after every change. failed(error): after a failed question.
   */
  constructor(page) {
    this.#page = page;
  }

  get running() {
    return this.#running !== null;
  }

  /** The turns as they are kept for `load`, without what only a running one needs. */
  get kept() {
    return this.turns.map(({ note: _, ...turn }) => turn);
  }

  /** Shows these turns instead. A running question is stopped. */
  load(turns, selected) {
    this.stop();
    this.#running = null;
    [this.turns, this.selected, this.#cards] = [turns, selected, []];
    this.#page.list.replaceChildren();
    for (const turn of turns) {
      if (turn.state === "running") turn.state = "stopped"; // the page was loaded again
      this.#add(turn);
    }
    this.draw();
  }

  stop() {
    this.#running?.abort();
  }

  draw() {
    for (const number of this.#cards.keys()) this.#drawCard(number);
  }

  #drawCard(number) {
    this.#cards[number].update(this.#page.timeline.duration || Infinity, number === this.selected);
  }

  #add(turn) {
    const card = new Card(turn, {
      onSeek: this.#page.seek,
      onShow: () => this.#select(this.turns.indexOf(turn)),
      onAgain: () => this.answer(turn.question),
    });
    this.#cards.push(card);
    this.#page.list.append(card.element);
  }

  #select(number) {
    this.selected = number;
    this.#changed();
  }

  #changed() {
    this.draw();
    this.#page.changed();
  }

  /** Asks a question and shows what comes, unless another one is being answered. */
  async answer(question) {
    if (this.running) return;
    const mine = new AbortController();
    this.#running = mine;
    const earlier = this.#page.mayRefer() ? this.turns.filter((turn) => turn.state === "done") : [];
    const turn = { question, answer: "", state: "running", note: "Waiting for the video…", chunks: [] };
    this.turns.push(turn);
    this.#add(turn);
    this.#changed();
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
    try {
      await this.#receive(turn, earlier, mine.signal);
      if (this.#running !== mine) return; // another video was opened
      turn.state = "done";
      this.selected = this.turns.indexOf(turn);
      this.#page.announce(`Answer: ${turn.answer || "none"}`);
    } catch (error) {
      if (this.#running !== mine) return;
      this.#fail(turn, error);
    }
    this.#running = null;
    this.#follow(() => this.#changed());
  }

  async #receive(turn, earlier, signal) {
    const [began, tracker] = [performance.now(), new Tracker()];
    const stopped = new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
    await Promise.race([this.#page.ready(), stopped]);
    for await (const event of ask(this.#page.request(turn.question, earlier), signal)) {
      if (event.kind === "watched") turn.note = tracker.watched(event.frames, event.total);
      else if (event.kind === "piece") {
        turn.answer += event.text;
        turn.note = "Answering…";
      } else if (event.kind === "end") {
        [turn.reason, turn.chunks, turn.whole] = [event.reason, event.chunks, event.chunks.length === 0];
      }
      this.#follow(() => this.#drawCard(this.turns.indexOf(turn)));
    }
    turn.seconds = (performance.now() - began) / 1000;
  }

  #fail(turn, error) {
    if (error.name === "AbortError") {
      turn.state = "stopped";
      this.#page.announce("Stopped.");
      return;
    }
    turn.state = "failed";
    turn.error = inSentence(error);
    this.#page.announce(""); // the card alerts to the error
    this.#page.failed(error);
  }

  /** What is scrolled: the box around the turns, or the whole page where it is narrow. */
  get #scroller() {
    const box = this.#page.scroll;
    return getComputedStyle(box).overflowY === "visible" ? document.scrollingElement : box;
  }

  /** Makes a change and keeps the end in sight, unless the user has scrolled away from it. */
  #follow(change) {
    const box = this.#scroller;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 160;
    change();
    if (atEnd) box.scrollTop = box.scrollHeight;
  }
}
