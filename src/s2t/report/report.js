"use strict";
// The token trace. Model text is untrusted: it is written with textContent alone. The index is small and searched as it
// is; runs, prompts and token texts lie in compressed blocks and are unpacked when a problem is looked at. The columns
// are described in trace.py.

const byId = (id) => document.getElementById(id);
const index = JSON.parse(byId("trace-index").textContent);
const list = byId("list"), card = byId("card");
const UNPACKED_AT_MOST = 40;
const state = { problem: -1, found: [], runs: [null, null], pieces: [], token: null, isPinned: false, ticket: 0, hiding: 0 };

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}
const clip = (text, size) => text.length > size ? text.slice(0, size - 1) + "…" : text;
const visible = (text) => text === "" ? "(empty)" : text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
const quoted = (text) => "“" + visible(text) + "”";
const plural = (count, word) => count.toLocaleString("en") + " " + word + (count === 1 ? "" : "s");
const number = (value) => value === null ? "–" : Math.abs(value) >= 1e-3 || value === 0 ? String(+value.toPrecision(3)) : value.toExponential(1);
const probability = (value) => value === null ? "–" : value === 0 ? "< 1e-6" : value >= 1e-3 ? value.toFixed(3) : value.toExponential(0);
const score = (value) => value === null ? "–" : value.toFixed(2).replace("-", "−");
const withUnit = (name, value) => name + " " + number(value) + (index.measures[name].unit ? " " + index.measures[name].unit : "");

// Unpacking

const unpacked = new Map();
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return JSON.parse(await new Response(stream).text());
}
function block(name) {
  if (!unpacked.has(name)) {
    if (unpacked.size >= UNPACKED_AT_MOST) unpacked.delete([...unpacked.keys()].find((key) => key !== "pieces"));
    unpacked.set(name, inflate(byId("z-" + name).textContent));
  }
  return unpacked.get(name);
}
function stepsOf(run) {
  if (!run) return null;
  const [fired, flipped, others] = [run.f, run.x, run.o].map((steps) => new Set(steps));
  return run.t.map((piece, i) => ({
    piece, fired: fired.has(i), flip: flipped.has(i), other: others.has(i), greedy: run.g[i], candidates: run.c[i],
  }));
}
const textOf = (piece) => state.pieces[piece][1];

// Which problems

const chosen = (side) => Number(byId(side ? "right" : "left").value);
const scores = (side) => index.scores[chosen(side)];
const flipsOf = (problem) => (scores(0).flips[problem] || 0) + (chosen(0) === chosen(1) ? 0 : scores(1).flips[problem] || 0);
function isDisagreed(problem) {
  const [left, right] = [scores(0).correct[problem], scores(1).correct[problem]];
  return left !== null && right !== null && left !== right;
}
const haystacks = [];
function haystack(problem) {
  haystacks[problem] ??= [index.ids[problem], index.questions[problem], index.golds[problem]].join("\n").toLowerCase();
  return haystacks[problem] + "\n" + [0, 1].map((side) => scores(side).answer[problem] ?? "").join("\n").toLowerCase();
}
function matches(problem, words) {
  if (byId("only-flips").checked && !flipsOf(problem)) return false;
  if (byId("only-disagree").checked && !isDisagreed(problem)) return false;
  if (!words.length) return true;
  const text = haystack(problem);
  return words.every((word) => text.includes(word));
}
function filter() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  state.found = index.ids.map((_, problem) => problem).filter((problem) => matches(problem, words));
  const all = plural(index.ids.length, "problem");
  byId("found").textContent = state.found.length === index.ids.length ? all : state.found.length.toLocaleString("en") + " of " + all;
  const at = state.found.indexOf(state.problem);
  if (at < 0) list.scrollTop = 0;
  byId("heads").textContent = index.strategies[chosen(0)] + " | " + index.strategies[chosen(1)];
  drawRows();
  if (at < 0 && state.found.length) open(state.found[0]);
}

// The list of problems: only the rows in view exist

const isNarrow = matchMedia("(max-width: 46rem)");
const rowHeight = () => (isNarrow.matches ? 4 : 2.5) * parseFloat(getComputedStyle(document.documentElement).fontSize);
function drawRows() {
  const height = rowHeight(), room = make("div", "room");
  room.style.height = state.found.length * height + "px";
  const first = Math.max(0, Math.floor(list.scrollTop / height) - 4);
  const last = Math.min(state.found.length, Math.ceil((list.scrollTop + list.clientHeight) / height) + 4);
  for (let at = first; at < last; at++) room.append(drawRow(at, height));
  if (!state.found.length) room.append(make("p", "muted empty", "No problem fits. Change the search or the filters."));
  list.replaceChildren(room);
  list.setAttribute("aria-activedescendant", state.found.includes(state.problem) ? "row-" + state.problem : "");
}
function drawRow(at, height) {
  const problem = state.found[at], row = make("div", "row"), flips = flipsOf(problem);
  row.id = "row-" + problem;
  row.dataset.problem = String(problem);
  row.style.top = at * height + "px";
  row.setAttribute("role", "option");
  row.setAttribute("aria-posinset", String(at + 1));
  row.setAttribute("aria-setsize", String(state.found.length));
  row.setAttribute("aria-selected", String(problem === state.problem));
  const verdicts = make("span", "v");
  [0, 1].forEach((side) => verdicts.append(mark(scores(side).correct[problem], index.strategies[chosen(side)])));
  row.append(make("span", "n", String(problem + 1)), make("span", "q", clip(index.questions[problem].replace(/\s+/g, " "), 240)),
    make("span", "f", flips ? plural(flips, "flip") : ""), verdicts);
  return row;
}
function mark(correct, name) {
  const node = make("span", correct === null ? "" : correct ? "right" : "wrong", correct === null ? "–" : correct ? "✓" : "✗");
  node.title = name + (correct === null ? ": not traced" : correct ? ": right" : ": wrong");
  node.setAttribute("aria-label", node.title);
  node.setAttribute("role", "img");
  return node;
}
function showRow(at) {
  const height = rowHeight(), top = at * height;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + height > list.scrollTop + list.clientHeight) list.scrollTop = top + height - list.clientHeight;
}
function moveTo(at) {
  const place = Math.max(0, Math.min(state.found.length - 1, at));
  if (state.found.length) { showRow(place); open(state.found[place]); }
}
function walkList(event) {
  const page = Math.max(1, Math.floor(list.clientHeight / rowHeight()) - 1), at = state.found.indexOf(state.problem);
  const moves = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: state.found.length - 1 };
  if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  moveTo(moves[event.key]);
}

// One problem, two strategies

async function open(problem) {
  const ticket = ++state.ticket, at = Math.floor(problem / index.blockSize), place = problem % index.blockSize;
  state.problem = problem;
  hide();
  drawRows();
  try {
    const names = ["pieces", "prompts-" + at, chosen(0) + "-" + at, chosen(1) + "-" + at];
    const [pieces, prompts, left, right] = await Promise.all(names.map(block));
    if (ticket !== state.ticket) return;
    state.pieces = pieces;
    state.runs = [left[place], right[place]].map((run) => run && { readings: run.m, steps: stepsOf(run) });
    drawProblem(prompts[place]);
  } catch (error) {
    byId("question").replaceChildren(make("p", "wrong", "The trace cannot be unpacked (" + error.message + "). A browser of 2023 or later is needed."));
  }
}
function drawProblem(prompt) {
  const problem = state.problem, details = make("details");
  details.append(make("summary", "muted", "Prompt as the model saw it"), make("pre", "", prompt));
  byId("question").replaceChildren(make("p", "", index.questions[problem]),
    make("p", "muted", "Problem " + (problem + 1) + " (" + index.ids[problem] + "), gold answer: " + index.golds[problem]), details);
  drawPanes();
}
function drawPanes() {
  hide();
  const first = firstDifference();
  [0, 1].forEach((side) => drawPane(side, first));
  byId("difference").disabled = first < 0;
  byId("next-flip").disabled = byId("previous-flip").disabled = !state.found.some(flipsOf) && !flipsOf(state.problem);
  byId("legend-colour").hidden = !byId("measure").value;
  byId("legend-other").hidden = !state.runs.some((run) => run && run.steps.some((step) => step.other));
  byId("said").textContent = differenceLine(first);
  document.documentElement.dataset.shown = String(state.problem);
}
function isSame(a, b) {  // by text: two tokenizers may differ in ids; by id where text says nothing
  if (a.piece === b.piece) return true;
  const [textA, textB] = [textOf(a.piece), textOf(b.piece)];
  return textA === textB && textA !== "" && !textA.includes("\ufffd");
}
function firstDifference() {
  const [a, b] = state.runs;
  if (!a || !b) return -1;
  const shared = Math.min(a.steps.length, b.steps.length);
  for (let i = 0; i < shared; i++) if (!isSame(a.steps[i], b.steps[i])) return i;
  return a.steps.length === b.steps.length ? -1 : shared;
}
function differenceLine(first) {
  const [a, b] = state.runs;
  if (!a || !b) return "";
  if (first < 0) return "Both wrote the same tokens.";
  const said = (run) => first < run.steps.length ? quoted(textOf(run.steps[first].piece)) : "the end";
  return "First difference at token " + (first + 1) + ": " + said(a) + " on the left, " + said(b) + " on the right.";
}
function drawPane(side, first) {
  const pane = byId("pane-" + side), name = index.strategies[chosen(side)], run = state.runs[side];
  pane.replaceChildren(make("h3", "", name));
  if (!run) { pane.append(make("p", "muted", "This problem was not traced with this strategy.")); return; }
  const measure = byId("measure").value, values = run.readings[measure], top = measure ? index.measures[measure].top : 0;
  const tokens = make("div", "tokens");
  tokens.setAttribute("role", "group");
  tokens.setAttribute("aria-label", "Tokens of " + name);
  tokens.dataset.side = String(side);
  run.steps.forEach((step, i) => tokens.append(drawToken(step, i, first, values ? values[i] / index.precision / top : 0)));
  pane.append(verdictLine(side), countLine(run.steps), rampLine(measure, values, top, name), tokens);
}
function verdictLine(side) {
  const line = make("p", "line"), correct = scores(side).correct[state.problem], answer = scores(side).answer[state.problem];
  line.append(make("span", "verdict " + (correct ? "right" : "wrong"), correct ? "✓ right" : "✗ wrong"));
  line.append(", answer " + (answer === null ? "not found" : clip(answer, 120)));
  return line;
}
function countLine(steps) {
  const count = (key) => steps.filter((step) => step[key]).length;
  return make("p", "line muted", plural(steps.length, "token") + ", " + count("fired") + " triggered, " + plural(count("flip"), "flip"));
}
function rampLine(measure, values, top, name) {
  if (!measure) return make("p", "line muted", "No colour.");
  if (!values) return make("p", "line muted", "No " + measure + " is known of " + name + ".");
  const line = make("p", "line muted");
  line.append(measure + ": 0", make("span", "ramp"), number(top) + (index.measures[measure].unit ? " " + index.measures[measure].unit + " or more" : ""));
  return line;
}
function drawToken(step, i, first, heat) {
  const classes = ["tok", step.fired && "fired", step.flip && "flip", step.other && "other", i === first && "first"];
  const token = make("span", classes.filter(Boolean).join(" ")), text = textOf(step.piece);
  if (heat > 0.01) token.style.setProperty("--v", String(Math.min(1, heat)));
  token.dataset.index = String(i);
  token.setAttribute("role", "button");
  token.tabIndex = step.fired || step.other || i === first || i === 0 ? 0 : -1;
  if (text === "") token.append(make("span", "ghost", "∅"));
  else for (const part of text.split(/(\n)/)) {
    if (part === "\n") token.append(make("span", "ghost", "⏎"), "\n");
    else if (part) token.append(part);
  }
  return token;
}

// One token

function candidateTable([pieces, slm, llm, marks, taken]) {
  const table = make("table"), head = make("tr"), body = make("tbody"), thead = make("thead");
  ["", "Candidate", "p_S", "p_L", "Score", "Taken"].forEach((name, i) => head.append(make("th", i === 1 ? "left" : "", name)));
  thead.append(head);
  const read = (column, rank, precision) => column && column[rank] !== null ? column[rank] / precision : null;
  pieces.forEach((piece, rank) => {
    const row = make("tr", rank === taken ? "chosen" : "");
    row.append(make("td", "", String(rank + 1)), make("td", "text", visible(textOf(piece))),
      make("td", "", probability(read(slm, rank, index.probabilityPrecision))), make("td", "", probability(read(llm, rank, index.probabilityPrecision))),
      make("td", "", score(read(marks, rank, index.precision))), make("td", "", rank === taken ? "✓" : ""));
    body.append(row);
  });
  table.append(thead, body);
  return table;
}
function readingsLine(run, i) {
  const said = Object.keys(index.measures).filter((name) => run.readings[name] && run.readings[name][i] !== null)
    .map((name) => withUnit(name, run.readings[name][i] / index.precision));
  const step = run.steps[i];
  said.push(step.flip ? "triggered, flipped" : step.fired ? "triggered, kept the greedy token" : "not triggered");
  return make("p", "muted", said.join("; "));
}
function fillCard(side, i) {
  const run = state.runs[side], step = run.steps[i], head = make("div", "head"), title = make("p"), close = make("button", "", "Close");
  title.append(make("strong", "", "Token " + (i + 1)), " of " + index.strategies[chosen(side)] + ": " + quoted(textOf(step.piece)));
  close.type = "button";
  close.addEventListener("click", dismiss);
  head.append(title);
  if (state.isPinned) head.append(close);
  card.replaceChildren(head, readingsLine(run, i));
  if (step.greedy !== undefined) card.append(make("p", "", "The SLM's greedy token: " + quoted(textOf(step.greedy))));
  if (step.candidates) {
    card.append(candidateTable(step.candidates));
    if (step.candidates[4] < 0) card.append(make("p", "", "The accepted token is none of the candidates."));
  }
}
function show(token, isPinned) {
  clearTimeout(state.hiding);
  if (state.token === token && state.isPinned === isPinned) return;
  hide();
  state.token = token;
  state.isPinned = isPinned;
  fillCard(Number(token.parentElement.dataset.side), Number(token.dataset.index));
  card.classList.toggle("pinned", isPinned);
  card.hidden = false;
  document.body.classList.add("has-card");
  token.setAttribute("aria-describedby", "card");
  token.setAttribute("aria-expanded", String(isPinned));
  place(token);
}
function place(token) {
  const box = token.getClientRects()[0], page = document.documentElement.clientWidth;
  const left = Math.max(8, Math.min(box.left, page - card.offsetWidth - 8));
  const fitsBelow = box.bottom + 8 + card.offsetHeight < window.innerHeight || box.top < card.offsetHeight + 8;
  card.style.left = (left + window.scrollX) + "px";
  card.style.top = ((fitsBelow ? box.bottom + 8 : box.top - card.offsetHeight - 8) + window.scrollY) + "px";
  if (state.isPinned || token.matches(":focus-visible")) reveal(token);  // not while a tap is still looking for its target
}
function reveal(token) {  // on a phone the card lies at the bottom, over what is there
  const hidden = token.getClientRects()[0].bottom + 12 - (window.innerHeight - card.offsetHeight);
  if (isNarrow.matches && hidden > 0) window.scrollBy(0, hidden);
}
function hide() {
  clearTimeout(state.hiding);
  if (state.token) ["aria-describedby", "aria-expanded"].forEach((name) => state.token.removeAttribute(name));
  state.token = null;
  state.isPinned = false;
  card.hidden = true;
  document.body.classList.remove("has-card");
}
function dismiss() {
  const token = state.token, hadFocus = card.contains(document.activeElement);
  hide();
  if (token && hadFocus) { token.focus({ preventScroll: true }); hide(); }
}
function hideSoon() {
  clearTimeout(state.hiding);
  if (!state.isPinned) state.hiding = setTimeout(hide, 150);
}
const tokenOf = (event) => event.target instanceof Element ? event.target.closest(".tokens .tok") : null;
function toggle(token) {
  if (state.token === token && state.isPinned) hide();
  else show(token, true);
}

// From token to token

function goTo(token) {
  token.scrollIntoView({ block: "center" });
  token.focus({ preventScroll: true });
  reveal(token);
}
const order = (token) => Number(token.dataset.index) * 2 + Number(token.parentElement.dataset.side);
function flipTokens() {
  const sides = chosen(0) === chosen(1) ? "#pane-0 .tok.flip" : ".pane .tok.flip";
  return [...document.querySelectorAll(sides)].sort((a, b) => order(a) - order(b));
}
async function goToFlip(direction) {
  const token = state.token || (document.activeElement.matches(".tokens .tok") ? document.activeElement : null);
  const flips = flipTokens(), at = token ? order(token) : direction > 0 ? -1 : Infinity;
  let next = direction > 0 ? flips.find((flip) => order(flip) > at) : flips.findLast((flip) => order(flip) < at);
  if (!next) {
    await openWithFlips(direction);
    next = direction > 0 ? flipTokens()[0] : flipTokens().at(-1);
  }
  if (next) goTo(next);
}
async function openWithFlips(direction) {
  const found = state.found, at = found.indexOf(state.problem);
  for (let step = 1; step <= found.length; step++) {
    const place = (((at + direction * step) % found.length) + found.length) % found.length;
    if (flipsOf(found[place])) { showRow(place); await open(found[place]); return; }
  }
}
function goToDifference() {
  const token = document.querySelector("#pane-1 .tok.first") || document.querySelector("#pane-0 .tok.first");
  if (token) goTo(token);
}
function walkTokens(event, token) {
  const next = { ArrowRight: "nextElementSibling", ArrowDown: "nextElementSibling", ArrowLeft: "previousElementSibling", ArrowUp: "previousElementSibling" };
  if (event.key === "Enter" || event.key === " ") toggle(token);
  else if (event.key in next) { if (token[next[event.key]]) token[next[event.key]].focus(); }
  else return;
  event.preventDefault();
}
const keys = {
  n: () => goToFlip(1), p: () => goToFlip(-1), d: goToDifference, "/": () => byId("search").focus(), Escape: dismiss,
};
function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const token = tokenOf(event), isTyping = event.target.matches("input, select, textarea");
  if (token) walkTokens(event, token);
  if (isTyping || event.defaultPrevented || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
}
function onClick(event) {
  const token = tokenOf(event), row = event.target.closest(".row");
  if (token) toggle(token);
  else if (row) open(Number(row.dataset.problem));
  else if (event.target.isConnected && !card.contains(event.target)) hide();
}

function fill(select, names, value) {
  names.forEach(([text, key]) => {
    const option = make("option", "", text);
    option.value = String(key);
    select.append(option);
  });
  select.value = String(value);
}
function fillSelects() {
  const strategies = index.strategies.map((name, place) => [name, place]), measures = Object.keys(index.measures);
  ["left", "right"].forEach((id, side) => fill(byId(id), strategies, index.pair[side]));
  fill(byId("measure"), [...measures.map((name) => [name, name]), ["nothing", ""]], measures[0] ?? "");
}
function listen() {
  document.addEventListener("mouseover", (event) => { const token = tokenOf(event); if (token && !state.isPinned) show(token, false); });
  document.addEventListener("mouseout", (event) => { if (tokenOf(event)) hideSoon(); });
  document.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token && token !== state.token) show(token, state.isPinned); });
  document.addEventListener("focusout", (event) => { if (tokenOf(event)) hideSoon(); });
  document.addEventListener("click", onClick);
  document.addEventListener("keydown", onKey);
  card.addEventListener("mouseenter", () => clearTimeout(state.hiding));
  card.addEventListener("mouseleave", hideSoon);
  window.addEventListener("resize", () => { hide(); drawRows(); });
  list.addEventListener("scroll", drawRows, { passive: true });
  list.addEventListener("keydown", walkList);
  byId("search").addEventListener("input", filter);
  ["only-flips", "only-disagree"].forEach((id) => byId(id).addEventListener("change", filter));
  ["left", "right"].forEach((id) => byId(id).addEventListener("change", () => { filter(); open(state.problem); }));
  byId("measure").addEventListener("change", drawPanes);
  byId("difference").addEventListener("click", (event) => { event.stopPropagation(); goToDifference(); });
  byId("next-flip").addEventListener("click", (event) => { event.stopPropagation(); goToFlip(1); });
  byId("previous-flip").addEventListener("click", (event) => { event.stopPropagation(); goToFlip(-1); });
}
function start() {
  fillSelects();
  listen();
  const all = index.ids.map((_, problem) => problem);
  const telling = all.find((problem) => isDisagreed(problem) && flipsOf(problem)) ?? all.find(isDisagreed) ?? all.find(flipsOf) ?? 0;
  state.problem = telling;
  filter();
  showRow(telling);
  open(telling);
}
start();
