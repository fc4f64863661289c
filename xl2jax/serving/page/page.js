// The page: one video, and the questions about it.

import { Problem, ask, describe, forget, hasKey, inSentence, keepKey, modelName, playable, upload } from "./api.js";
import { Conversation } from "./conversation.js";
import { LivePanel } from "./live.js";
import { ProgressBar, Tracker } from "./progress.js";
import { thumbnails } from "./thumbnails.js";
import { Timeline } from "./timeline.js";
import { inWords } from "./times.js";

const STATE = "xl2jax.page";
const FIRST_LOOK = "What happens in the video?"; // makes the server watch the video while the user still types
const TITLE = document.title;

const $ = (id) => document.getElementById(id);
const player = $("player");
const progress = new ProgressBar($("progress"), announce);
const timeline = new Timeline($("timeline"), seek);
const live = new LivePanel($("live"), $("view"), {
  fps: () => (Number($("fps").value) > 0 ? Number($("fps").value) : null),
  announce,
  failed: cameraFailed,
  begun: cameraBegun,
});
const conversation = new Conversation({
  list: $("turns"),
  scroll: $("scroll"),
  timeline,
  seek,
  announce,
  mayRefer: () => $("follow-up").checked,
  request: chatRequest,
  ready: () => (source?.live ? live.ready : ready),
  changed: conversationChanged,
  failed: askForKey,
});

/** The video: {name, file: {id, bytes}}, {name, url}, or the camera {name, live: {id}}, with `chunks` once it was watched. */
let source = null;
/** The file that the user chose. It is not known any more after a reload. */
let local = null;
/** Resolves when the server has the video. */
let ready = Promise.resolve();
/** Stops what is going on for this video, and for its upload and first look. */
let all = new AbortController();
let preparing = new AbortController();

const onServer = () => Boolean(source?.file || source?.url || source?.live?.id);

// --- what is kept over a reload -----------------------------------------------------------------

function save() {
  const value = (field) => (field.type === "checkbox" ? field.checked : field.value);
  const settings = Object.fromEntries(settingFields().map((field) => [field.id, value(field)]));
  const { kept: turns, selected } = conversation;
  const state = JSON.stringify({ settings, ...(onServer() ? { source, turns, selected } : {}) });
  try {
    sessionStorage.setItem(STATE, state);
    $("not-kept").hidden = true;
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    sessionStorage.removeItem(STATE); // rather than an older state, which may be of another video
    $("not-kept").hidden = false;
  }
}

function restore() {
  let kept;
  try {
    kept = JSON.parse(sessionStorage.getItem(STATE)) ?? {};
  } catch {
    kept = {};
  }
  for (const field of settingFields()) {
    const value = kept.settings?.[field.id];
    if (field.type === "checkbox") field.checked = value === true;
    else field.value = value ?? "";
  }
  if (!kept.source) return;
  source = kept.source;
  conversation.load(kept.turns, kept.selected);
}

function settingFields() {
  return [...$("settings").querySelectorAll("input")];
}

// --- small things -------------------------------------------------------------------------------

/** Says something to a screen reader, in its own time. */
function announce(text) {
  $("announcer").textContent = text;
}

function showText(id, text) {
  $(id).textContent = text ?? "";
  $(id).hidden = !text;
}

/** Asks for the key, if that is what failed. */
function askForKey(error) {
  if (error.status !== 401 || $("key").open) return;
  showText("key-error", hasKey() ? error.message : null);
  $("key").showModal();
}

// --- the video ----------------------------------------------------------------------------------

function seek(seconds) {
  if (player.hidden || source?.live) timeline.focusAt(seconds);
  else player.currentTime = seconds;
  timeline.time = seconds;
}

/** Shows the page for `source`, or the start where there is none. */
function show() {
  const started = source !== null;
  $("start").hidden = started;
  $("workspace").hidden = $("new-video").hidden = !started;
  $(started ? "video" : "start").append($("settings"));
  document.body.classList.toggle("started", started);
  document.title = started ? `${source.name} – xl2jax` : TITLE;
  $("video-name").textContent = source?.name ?? "";
  showText("status", null);
  showVideoError(null);
  progress.end();
  if (source?.live) player.hidden = true;
  for (const id of ["fps", "max-frames"]) $(id).disabled = Boolean(source?.live);
  conversationChanged();
}

/** Lets go of the video, and deletes its upload. */
function startOver() {
  all.abort();
  all = new AbortController();
  if (source?.file) forget(source.file.id);
  live.close();
  source = local = null;
  if (player.src.startsWith("blob:")) URL.revokeObjectURL(player.src);
  player.removeAttribute("src");
  player.load();
  timeline.clear();
  conversation.load([], -1);
  showText("start-error", null);
  show();
}

function openFile(file) {
  startOver();
  local = file;
  source = { name: file.name };
  show();
  play(URL.createObjectURL(file));
  prepare();
  $("question").focus();
}

function openLink(text) {
  let url = null;
  try {
    url = new URL(text.trim());
  } catch {
    // It is refused below.
  }
  if (!["https:", "http:", "file:"].includes(url?.protocol)) {
    showText("start-error", "A link begins with https://, http:// or file://.");
    $("url").focus();
    return;
  }
  startOver();
  source = { name: url.pathname.split("/").pop() || url.host, url: url.href };
  show();
  cannotPlayLink();
  prepare();
  $("question").focus();
}

/** Takes the camera as the video. */
function openCamera() {
  startOver();
  source = { name: "Camera", live: { id: null } };
  show();
  live.open();
  live.start();
  $("question").focus();
}

function cameraBegun(id) {
  source.live.id = id;
  save();
}

function cameraFailed(error) {
  showVideoError(error && inSentence(error));
  if (error) askForKey(error);
}

/** Shows the video at `src` in the player, and thumbnails of it on the timeline. */
async function play(src) {
  const { signal } = all;
  player.hidden = false;
  showText("unplayable", null);
  player.src = src;
  timeline.clearThumbnails();
  try {
    const places = (aspect) => timeline.makePlaces(aspect);
    for await (const { number, canvas } of thumbnails(src, places, signal)) timeline.setThumbnail(number, canvas);
  } catch {
    if (!signal.aborted) timeline.clearThumbnails(); // the player says what is wrong
  }
}

function cannotPlay(reason) {
  player.hidden = true;
  timeline.clearThumbnails();
  showText("unplayable", reason);
}

function cannotPlayLink() {
  cannotPlay("A linked video is not played here, and its timeline has no pictures.");
}

/** Plays an uploaded file again after a reload. */
async function playAgain(here) {
  try {
    const src = await playable(await describe(here.file.id));
    if (here !== source) return; // another video was opened
    if (src === null) cannotPlay("The video is too large to be played again after a reload.");
    else play(src);
  } catch (error) {
    if (here === source) cannotPlay("The video cannot be played.");
    throw error.status === 404 ? new Problem("The server does not have this video any more. Choose it again.") : error;
  }
}

/** Brings the video to the server and has it watched. */
async function prepare() {
  if (source.live) {
    live.start();
    return;
  }
  const here = source;
  preparing = new AbortController();
  const signal = AbortSignal.any([all.signal, preparing.signal]);
  showVideoError(null);
  showText("status", null);
  try {
    if (here.file && local === null && !player.hasAttribute("src")) await playAgain(here);
    if (here !== source) return; // another video was opened
    ready = onServer() ? Promise.resolve() : send(here, signal);
    await ready;
    if (here !== source) return;
    await look(here, signal);
  } catch (error) {
    if (here !== source) return;
    progress.end();
    if (error.name !== "AbortError") {
      showVideoError(inSentence(error));
      askForKey(error);
    } else if (onServer()) {
      showText("status", "The video was not watched to its end. The next question begins again.");
    } else {
      startOver();
    }
  }
}

/** Uploads the file. */
async function send(here, signal) {
  const [tracker, total] = [new Tracker(), local.size];
  progress.wait("Uploading…");
  const onProgress = (sent) => progress.set(tracker.uploaded(Math.min(sent, total), total), Math.min(1, sent / total));
  const about = await upload(local, { signal, onProgress });
  here.file = { id: about.id, bytes: about.bytes };
  save();
}

/** Has the video watched by a question whose answer nobody reads. */
async function look(here, signal) {
  const [began, tracker] = [performance.now(), new Tracker()];
  progress.wait(here.url ? "The server fetches the video…" : "Opening the video…");
  let usage = null;
  for await (const event of ask({ ...chatRequest(FIRST_LOOK, []), max_completion_tokens: 1 }, signal)) {
    if (event.kind === "watched") {
      progress.set(tracker.watched(event.frames, event.total), event.frames / event.total);
      if (event.frames === event.total) progress.wait("Getting ready for questions…");
    }
    if (event.kind === "end") here.chunks = event.chunks;
    if (event.kind === "usage") usage = event.usage;
  }
  if (here !== source) return;
  progress.end();
  const text = usage.video_cached
    ? `Ready: ${usage.frames} frames, watched before.`
    : `Ready: watched ${usage.frames} frames in ${inWords((performance.now() - began) / 1000)}.`;
  showText("status", text);
  announce(text);
  conversationChanged();
}

function showVideoError(text) {
  $("video-error").hidden = !text;
  $("video-error").querySelector("p").textContent = text ?? "";
}

player.addEventListener("error", () => {
  if (!player.hasAttribute("src")) return;
  cannotPlay("This browser cannot play the file. The server may be able to read it all the same.");
});
player.addEventListener("loadedmetadata", () => {
  timeline.duration = player.duration;
  conversation.draw();
});
for (const name of ["timeupdate", "seeked"]) player.addEventListener(name, () => (timeline.time = player.currentTime));

// --- questions ----------------------------------------------------------------------------------

function videoPart() {
  if (source.live) return { type: "video_url", video_url: null, uuid: source.live.id };
  if (source.url) return { type: "video_url", video_url: { url: source.url } };
  return { type: "file", file: { file_id: source.file.id } };
}

/** The body of a chat request. `earlier` are the turns that the question may refer to. */
function chatRequest(question, earlier) {
  const video = videoPart();
  const messages = earlier.flatMap((turn) => [
    { role: "user", content: [{ type: "text", text: turn.question }] },
    { role: "assistant", content: turn.answer },
  ]);
  messages.push({ role: "user", content: [{ type: "text", text: question }] });
  messages[0].content.unshift(video);
  const own = { chunks: true };
  for (const [name, id] of [
    ["fps", "fps"],
    ["max_frames", "max-frames"],
    ["top_chunks", "top-chunks"],
  ]) {
    const value = $(id).value.trim();
    if (value && !$(id).disabled) own[name] = Number.isNaN(Number(value)) ? value : Number(value);
  }
  return { messages, xl2jax: own };
}

function conversationChanged() {
  const turn = conversation.turns[conversation.selected];
  if (source?.live && turn?.chunks.length && timeline.duration !== turn.chunks.at(-1).end) {
    timeline.duration = turn.chunks.at(-1).end; // it grows
    conversation.draw(); // times in answers become links
  }
  if (turn) timeline.show(turn.chunks, turn.question, turn.whole);
  else timeline.show(source?.chunks ?? []);
  $("no-turns").hidden = conversation.turns.length > 0;
  $("send").hidden = conversation.running;
  $("stop").hidden = !conversation.running;
  save();
}

// --- what the user does -------------------------------------------------------------------------

$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) openFile(file);
  $("file").value = "";
});
$("camera").addEventListener("click", openCamera);
$("link").addEventListener("submit", (event) => {
  event.preventDefault();
  openLink($("url").value);
});
$("new-video").addEventListener("click", () => {
  startOver();
  $("file").focus();
});
$("cancel").addEventListener("click", () => preparing.abort());
$("retry").addEventListener("click", prepare);
$("stop").addEventListener("click", () => {
  conversation.stop();
  $("question").focus();
});
$("settings").addEventListener("change", save);

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || conversation.running) return;
  $("question").value = "";
  conversation.answer(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});

$("key").addEventListener("cancel", (event) => event.preventDefault()); // nothing works without the key
$("key-form").addEventListener("submit", () => {
  keepKey($("key-value").value.trim());
  $("key-value").value = "";
  connect();
});

for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (!file) return;
  event.preventDefault();
  openFile(file);
});
addEventListener("paste", (event) => {
  if ($("start").hidden || event.target.matches("input")) return;
  const [file] = event.clipboardData.files;
  if (file) openFile(file);
  else $("url").value = event.clipboardData.getData("text/plain").trim();
});

// --- the beginning ------------------------------------------------------------------------------

/** Finds out whether the server is there and takes the key, and makes the video of the last load usable. */
async function connect() {
  showText("start-error", null);
  const here = source;
  try {
    const model = await modelName();
    showText("model", model);
    if (model === "demo") $("question").placeholder = "What colour was the star?"; // it answers such questions only
  } catch (error) {
    if (here !== source) return; // a video was opened meanwhile: what fails is said there
    const text = error.status === 401 ? null : inSentence(error);
    if (source === null) showText("start-error", text);
    else showVideoError(text);
    askForKey(error);
    return;
  }
  if (here === null || here !== source) return; // a video that was opened meanwhile is on its way
  if (here.url) cannotPlayLink();
  if (here.live) live.open(here.live.id); // a page that was loaded again does not start the camera by itself
  else prepare();
}

restore();
show();
connect();
