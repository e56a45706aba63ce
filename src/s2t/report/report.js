// The token trace, behind the shared script of s2t.web. The index is small and searched as it is; runs, prompts and token texts
// lie in compressed blocks and are unpacked when a problem is looked at. The columns are described in trace.py.

const index = JSON.parse(byId("trace-index").textContent);
const list = byId("list");
const UNPACKED_AT_MOST = 40;
const state = { problem: -1, found: [], runs: [null, null], pieces: [], ticket: 0 };

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
  card.hide();
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
  card.hide();
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
  const classes = [step.fired && "fired", step.flip && "flip", step.other && "other", i === first && "first"];
  return makeToken(classes, textOf(step.piece), heat, i, step.fired || step.other || i === first || i === 0);
}

// One token

function stepTable([pieces, slm, llm, marks, taken]) {
  const read = (column, rank, precision) => column && column[rank] !== null ? column[rank] / precision : null;
  const rows = pieces.map((piece, rank) => [textOf(piece), probability(read(slm, rank, index.probabilityPrecision)),
    probability(read(llm, rank, index.probabilityPrecision)), score(read(marks, rank, index.precision))]);
  return candidateTable(["p_S", "p_L", "Score"], rows, taken);
}
function readingsLine(run, i) {
  const said = Object.keys(index.measures).filter((name) => run.readings[name] && run.readings[name][i] !== null)
    .map((name) => withUnit(name, run.readings[name][i] / index.precision));
  const step = run.steps[i];
  said.push(step.flip ? "triggered, flipped" : step.fired ? "triggered, kept the greedy token" : "not triggered");
  return make("p", "muted", said.join("; "));
}
function describe(token) {
  const side = Number(token.parentElement.dataset.side), i = Number(token.dataset.index);
  const run = state.runs[side], step = run.steps[i], title = make("p"), told = [title, readingsLine(run, i)];
  title.append(make("strong", "", "Token " + (i + 1)), " of " + index.strategies[chosen(side)] + ": " + quoted(textOf(step.piece)));
  if (step.greedy !== undefined) told.push(make("p", "", "The SLM's greedy token: " + quoted(textOf(step.greedy))));
  if (step.candidates) {
    told.push(stepTable(step.candidates));
    if (step.candidates[4] < 0) told.push(make("p", "", "The accepted token is none of the candidates."));
  }
  return told;
}
const card = makeCard(byId("card"), describe);

// From token to token

const order = (token) => Number(token.dataset.index) * 2 + Number(token.parentElement.dataset.side);
function flipTokens() {
  const sides = chosen(0) === chosen(1) ? "#pane-0 .tok.flip" : ".pane .tok.flip";
  return [...document.querySelectorAll(sides)].sort((a, b) => order(a) - order(b));
}
async function goToFlip(direction) {
  const token = card.current(), flips = flipTokens(), at = token ? order(token) : direction > 0 ? -1 : Infinity;
  let next = direction > 0 ? flips.find((flip) => order(flip) > at) : flips.findLast((flip) => order(flip) < at);
  if (!next) {
    await openWithFlips(direction);
    next = direction > 0 ? flipTokens()[0] : flipTokens().at(-1);
  }
  if (next) card.goTo(next);
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
  if (token) card.goTo(token);
}
const keys = {
  n: () => goToFlip(1), p: () => goToFlip(-1), d: goToDifference, "/": () => byId("search").focus(), Escape: card.dismiss,
};
function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const isTyping = event.target.matches("input, select, textarea");
  if (isTyping || event.defaultPrevented || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
}
function onClick(event) {
  const row = event.target.closest(".row");
  if (row) open(Number(row.dataset.problem));
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
  document.addEventListener("click", onClick);
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", drawRows);
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
