// The conversation: the page holds it and sends all of it with each question, see answering.py.
import { button, byId, make, promptText, showLarge, sight, toast } from "./drawing.js";

const KEPT = "conversation"; // in the tab's session storage: survives a reload
const LOOK_SECONDS = 5; // between looks for new models
const question = byId("question"), models = byId("model"), chat = byId("chat");
const number = (count) => count.toLocaleString("en");

let turns = []; // {question, pictures, answer, failure, notes, prompt, tokens, model, seconds, cut, stopped}
let waiting = []; // pictures of the next question; those that are being looked at have no id yet
let running = null; // AbortController of the answer that is being given

// --- requests

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: was chat.py stopped?");
  }
  if (response.ok) return response;
  const text = await response.text();
  let said;
  try { said = JSON.parse(text).error; } catch { said = text; }
  throw new Error(said || `The server answered ${response.status}`);
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const found = (rest + value).split("\n");
    rest = found.pop();
    for (const line of found) if (line) yield JSON.parse(line);
  }
}

// --- models

async function lookForModels() {
  let found;
  try {
    found = await (await request("models")).json();
  } catch (error) {
    byId("state").textContent = error.message;
    return;
  }
  if (!running) byId("state").textContent = "";
  document.title = byId("given").textContent = found.given;
  const before = [...models.options].map((option) => option.value), chosen = models.value;
  for (const [id, value] of [["temperature", found.defaults.temperature], ["most", found.defaults.max_new_tokens]])
    if (byId(id).value === "") byId(id).value = value;
  if (found.models.join("\n") === before.join("\n")) return;
  models.replaceChildren(...found.models.map((name) => new Option(name, name)));
  const gone = chosen && !found.models.includes(chosen);
  models.value = chosen && !gone ? chosen : found.loaded ?? found.models[0];
  if (gone) toast(`${chosen} is no longer there: ${models.value} is chosen`);
  const fresh = found.models.filter((name) => !before.includes(name));
  if (before.length && fresh.length) toast(`Can be chosen now: ${fresh.join(", ")}`, { isNews: true });
}

// --- pictures

function addFiles(files) {
  for (const file of files) addFile(file);
}

async function addFile(file) {
  const picture = { name: file.name };
  waiting.push(picture);
  drawWaiting();
  try {
    Object.assign(picture, await (await request(`pictures?model=${encodeURIComponent(models.value)}`, { method: "POST", body: file })).json());
  } catch (error) {
    waiting = waiting.filter((other) => other !== picture);
    toast(`${file.name || "The picture"}: ${error.message}`);
  }
  drawWaiting();
}

// What a picture looks like to the chosen model; one that the server no longer keeps stays as it is.
async function lookAgain(picture) {
  try {
    const shown = await request(`pictures/${picture.id}?model=${encodeURIComponent(models.value)}`);
    Object.assign(picture, await shown.json());
  } catch (error) {
    picture.lost = error.message;
  }
}

function drawWaiting() {
  byId("waiting").replaceChildren(...waiting.map((picture) => {
    const drawn = picture.id ? opening(picture) : make("div", "sight loading", "looking …");
    const remove = button("✕", () => { waiting = waiting.filter((other) => other !== picture); drawWaiting(); }, "remove");
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    drawn.append(remove);
    return drawn;
  }));
  refreshButtons();
}

function opening(picture) {
  if (!picture.preview) return make("p", "quiet", `${picture.name}: ${picture.lost ?? ""}`);
  const drawn = sight(picture);
  const panels = drawn.querySelector(".panels");
  panels.classList.add("open");
  Object.assign(panels, { tabIndex: 0, role: "button", title: "Larger" });
  panels.addEventListener("click", () => showLarge(picture));
  panels.addEventListener("keydown", (event) => { if (event.key === "Enter") showLarge(picture); });
  return drawn;
}

// --- the conversation

function refreshButtons() {
  const isReady = waiting.every((picture) => picture.id) && (question.value.trim() || waiting.length);
  byId("send").disabled = !isReady || !models.value;
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
  byId("empty").hidden = turns.length > 0;
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function send() {
  if (running || byId("send").disabled) return;
  for (const id of ["temperature", "most"])
    if (!byId(id).checkValidity()) {
      byId("settings").open = true;
      byId(id).reportValidity();
      return;
    }
  turns.push({ question: question.value.trim(), pictures: waiting });
  waiting = [];
  question.value = "";
  drawWaiting();
  answer(turns.length - 1);
}

// Asks the question of a turn, with all before it.
async function answer(place) {
  const turn = turns[place];
  turns = turns.slice(0, place + 1);
  Object.assign(turn, { answer: "", failure: "", notes: [], prompt: null, model: models.value, seconds: 0, cut: false, stopped: false });
  running = new AbortController();
  draw();
  chat.scrollTop = chat.scrollHeight;
  const plain = (one) => ({ question: one.question, pictures: one.pictures.map((picture) => picture.id), answer: one.answer });
  const body = JSON.stringify({
    model: turn.model, turns: turns.slice(0, -1).filter((one) => one.answer).map(plain), ask: plain(turn),
    max_new_tokens: Number(byId("most").value), temperature: Number(byId("temperature").value),
  });
  let isEnded = false;
  try {
    for await (const event of lines(await request("ask", { method: "POST", body, signal: running.signal }))) {
      isEnded ||= ["end", "error"].includes(event.event);
      take(event, turn);
    }
    if (!isEnded) turn.failure = "The server ended in the middle of this answer";
  } catch (error) {
    if (error.name === "AbortError") turn.stopped = true;
    else turn.failure = error.message;
  }
  running = null;
  byId("state").textContent = "";
  turn.answer = turn.answer.trim();
  draw();
  keep();
}

function take(event, turn) {
  const states = { waiting: "Another answer comes first …", loading: `Loading ${turn.model} …`, prompt: "", piece: "" };
  if (event.event in states) byId("state").textContent = states[event.event];
  if (event.event === "note") turn.notes.push(event.text);
  if (event.event === "prompt") Object.assign(turn, { prompt: event.parts, tokens: event.tokens });
  if (event.event === "piece") turn.answer += event.text;
  if (event.event === "end") Object.assign(turn, { answer: event.text, seconds: event.seconds, cut: event.cut });
  if (event.event === "error") turn.failure = event.text;
  if (event.event === "piece") drawPiece(turn);
}

// The last answer grows; the view follows unless the reader has scrolled up.
function drawPiece(turn) {
  const follows = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 80;
  chat.querySelector(".turn:last-child .answer > .said").textContent = turn.answer;
  if (follows) chat.scrollTop = chat.scrollHeight;
}

function draw() {
  const top = chat.scrollTop, follows = chat.scrollHeight - top - chat.clientHeight < 80;
  for (const old of chat.querySelectorAll(".turn")) old.remove();
  chat.append(...turns.map(drawTurn));
  chat.scrollTop = follows ? chat.scrollHeight : top;
  refreshButtons();
}

function drawTurn(turn, place) {
  const pictures = turn.pictures.length ? make("div", "pictures", ...turn.pictures.map(opening)) : null;
  const asked = make("div", "question", pictures, turn.question ? make("p", "", turn.question) : null);
  const isLast = place === turns.length - 1, isBusy = isLast && running;
  const answered = make("div", isBusy ? "answer busy" : "answer", ...(turn.notes ?? []).map((text) => make("p", "note", text)));
  answered.append(make("p", "said", turn.answer));
  if (turn.failure) answered.append(make("p", "failure", turn.failure));
  if (!isBusy) answered.append(actions(turn, place, isLast));
  if (turn.isOpen && turn.prompt) answered.append(make("div", "prompt", ...promptText(turn.prompt)));
  return make("article", "turn", asked, answered);
}

function actions(turn, place, isLast) {
  const row = make("div", "actions");
  if (turn.answer) row.append(button("Copy", () => navigator.clipboard?.writeText(turn.answer)));
  if (isLast) row.append(button(turn.failure ? "Try again" : "Regenerate", () => answer(place), "again"));
  if (isLast && turn.failure) row.append(button("Take back", takeBack));
  if (turn.prompt) {
    const open = button("Prompt", () => { turn.isOpen = !turn.isOpen; draw(); }, "show-prompt");
    open.setAttribute("aria-expanded", Boolean(turn.isOpen));
    row.append(open);
  }
  row.append(make("span", "quiet", facts(turn).join(" · ")));
  return row;
}

function facts(turn) {
  return [
    turn.model, turn.tokens && `prompt of ${number(turn.tokens)} tokens`, turn.seconds && `${turn.seconds.toFixed(1)} s`,
    turn.cut && "cut at the longest answer (Settings)", turn.stopped && "stopped",
    !turn.answer && !turn.failure && "an empty answer, left out of the chat from here",
  ].filter(Boolean);
}

// Puts the last question and its pictures back to where they were written.
function takeBack() {
  const turn = turns.pop();
  question.value = turn.question;
  waiting = [...turn.pictures, ...waiting];
  drawWaiting();
  draw();
  keep();
  question.focus();
}

function startAnew() {
  running?.abort();
  turns = [];
  draw();
  keep();
  question.focus();
}

function keep() {
  const slim = (picture) => ({ id: picture.id, name: picture.name });
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(turns.map((turn) => ({ ...turn, pictures: turn.pictures.map(slim) }))));
  } catch { /* full or switched off: a reload then begins anew */ }
}

async function restore() {
  try { turns = JSON.parse(sessionStorage.getItem(KEPT)) ?? []; } catch { turns = []; }
  await Promise.all(turns.flatMap((turn) => turn.pictures).map(lookAgain));
  draw();
  chat.scrollTop = chat.scrollHeight;
}

// --- what a person does

byId("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("stop").addEventListener("click", () => running?.abort());
byId("anew").addEventListener("click", startAnew);
byId("add").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", () => { addFiles(byId("files").files); byId("files").value = ""; });
question.addEventListener("input", refreshButtons);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  addFiles(event.clipboardData.files);
});
document.addEventListener("click", (event) => {
  if (!byId("settings").contains(event.target)) byId("settings").open = false;
});
byId("settings").querySelector("form").addEventListener("submit", (event) => event.preventDefault());
byId("large").addEventListener("click", (event) => { if (event.target === byId("large")) byId("large").close(); });
models.addEventListener("change", async () => {
  await Promise.all(waiting.filter((picture) => picture.id).map(lookAgain));
  drawWaiting();
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").hidden = !event.dataTransfer.types.includes("Files");
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) byId("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").hidden = true;
  if (event.dataTransfer.files.length) addFiles(event.dataTransfer.files);
});
setInterval(() => { if (!document.hidden) lookForModels(); }, 1000 * LOOK_SECONDS);

await lookForModels();
await restore();
