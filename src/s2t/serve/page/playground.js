"use strict";
// The playground, behind the shared script of s2t.web: one problem, two strategies, streamed side by side. It asks this server
// alone, and keeps nothing. Model text is untrusted: it is written with textContent alone.

const EXAMPLES = [
  "A boy has 21 toys. His cousin has 5 fewer toys than he has. How many toys do they have together?",
  "Robert is 10 years old. In 4 years his cousin Jennifer will be 4 times as old as Robert is now. How old is Jennifer right now?",
  "Charlotte is required to submit a 80-page dissertation. She already finished writing 1/2 of the dissertation. How many pages does she have left to write?",
  "There are 8 girls in the yard. If there are 2 times the number of boys in the yard, how many kids are in the yard?",
];
const MEASURES = {
  criticality: ["criticality", (step) => step.criticality],
  uncertainty: ["uncertainty, 1 − p of the token", (step) => { const taken = step.candidates.find((one) => one.selected); return taken ? 1 - Math.exp(taken.logprob) : step.candidates.length ? 1 : null; }],
};
const state = { model: "", runs: [null, null], first: -1, example: 0, abort: null };

// Asking the server

const headers = () => ({ "Content-Type": "application/json", ...(byId("key").value ? { Authorization: "Bearer " + byId("key").value } : {}) });
async function failure(response) {
  try { return (await response.json()).error.message; } catch { return "the server answered " + response.status; }
}
async function* events(response) {  // the data of server-sent events, parsed
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
async function connect() {
  const response = await fetch("v1/models", { headers: headers() });
  const needsKey = response.status === 401;
  byId("key-label").hidden = !needsKey && !byId("key").value;
  if (!response.ok) {
    say(needsKey ? (byId("key").value ? "This key is not the server's." : "This server asks for a key.") : await failure(response), true);
    if (needsKey) byId("key").focus();
    return;
  }
  const served = (await response.json()).data;
  const ids = served.map((model) => model.id);
  state.model = ids[0];
  byId("about").textContent = "The same small model, " + state.model + ", token by token, under two strategies." + running(served[0].engine);
  fillSelects(ids.slice(1).map((id) => id.slice(state.model.length + 1)));
  say("", false);
  document.documentElement.dataset.ready = "true";
}
function running(told) {
  if (!told) return "";
  const bytes = told.weights_bytes + (told.cache_bytes ?? 0);
  const size = bytes < 1e8 ? (bytes / 1e6).toFixed(1) + " MB" : (bytes / 1e9).toFixed(1) + " GB";
  const threads = told.threads ? ", " + told.threads + (told.threads === 1 ? " thread" : " threads") : "";
  return " It runs on " + told.engine + " (" + told.quantization + threads + "), reads " + told.context_length.toLocaleString("en") +
    " tokens and takes about " + size + " of memory.";
}
function fillSelects(strategies) {
  const pair = ["greedy", strategies.find((name) => name !== "greedy" && name !== "sample") ?? "sample"];
  ["left", "right"].forEach((id, side) => fill(byId(id), strategies.map((name) => [name, name]), pair[side]));
}
function fill(select, options, value) {
  select.replaceChildren(...options.map(([key, text]) => { const option = make("option", "", text); option.value = key; return option; }));
  select.value = value;
}

// Writing

function say(text, isWrong) {
  byId("said").textContent = text;
  byId("said").className = isWrong ? "wrong" : "muted";
}
async function answer() {
  if (!state.model) { await connect(); if (!state.model) return; }
  if (!byId("form").reportValidity()) return;
  stop();
  card.hide();
  const abort = state.abort = new AbortController();
  state.first = -1;
  state.runs = ["left", "right"].map((id, side) => newRun(byId(id).value, side));
  byId("answers").hidden = false;
  legend();
  say("Writing…", false);
  byId("stop").disabled = false;
  await Promise.all(state.runs.map((run) => write(run, abort)));
  if (state.abort !== abort) return;  // another answer was asked for meanwhile
  byId("stop").disabled = true;
  markFirst(true);
  say(state.runs.every((run) => run.error) ? "" : summary(), false);
  document.documentElement.dataset.shown = String(Number(document.documentElement.dataset.shown ?? 0) + 1);
}
function newRun(strategy, side) {
  const tokens = make("div", "tokens"), line = make("p", "line muted figures"), pane = byId("pane-" + side);
  tokens.setAttribute("role", "group");
  tokens.setAttribute("aria-label", "Tokens of " + strategy);
  tokens.setAttribute("aria-busy", "true");
  tokens.dataset.side = String(side);
  pane.replaceChildren(make("h3", "", strategy), line, tokens);
  return { strategy, side, steps: [], tokens, line, error: "", reason: null, started: performance.now(), firstAfter: null, ended: null };
}
async function write(run, abort) {
  const body = {
    model: state.model, messages: [{ role: "user", content: byId("problem").value }], max_tokens: Number(byId("length").value),
    stream: true, s2t: { strategy: run.strategy, details: true },
  };
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: abort.signal });
    if (!response.ok) throw new Error(await failure(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) take(run, choice);
    }
  } catch (error) {
    run.error = error.name === "AbortError" ? "" : error.message;
    run.reason ??= error.name === "AbortError" ? "stopped" : "failed";
  }
  run.ended = performance.now();
  run.tokens.setAttribute("aria-busy", "false");
  if (run.error) run.tokens.after(make("p", "line wrong", run.error));
  figures(run);
}
function take(run, choice) {
  const steps = choice.s2t ? choice.s2t.steps : [];
  if (steps.length) run.firstAfter ??= performance.now() - run.started;
  for (const step of steps) {
    const i = run.steps.push(step) - 1;
    run.tokens.append(makeToken([step.fired && "fired", step.flip && "flip"], step.token, heat(step), i, step.fired || i === 0));
  }
  run.reason = choice.finish_reason ?? run.reason;
  markFirst(false);
  figures(run);
}
function stop() {
  if (state.abort) state.abort.abort();
  byId("stop").disabled = true;
}

// What is known of the two

const ENDS = { stop: "complete", length: "cut at the longest answer", stopped: "stopped", failed: "failed" };
function figures(run) {
  const seconds = ((run.ended ?? performance.now()) - run.started) / 1000, count = (key) => run.steps.filter((step) => step[key]).length;
  const parts = [[run.steps.length, run.steps.length === 1 ? "token" : "tokens"], [number(run.steps.length / seconds), "tokens/s"]];
  if (run.firstAfter !== null) parts.push([number(run.firstAfter / 1000) + " s", "to the first"]);
  if (run.steps.some((step) => step.value !== null || step.fired)) parts.push([count("fired"), "triggered"], [count("flip"), count("flip") === 1 ? "flip" : "flips"]);
  run.line.replaceChildren(...parts.map(([value, text]) => { const part = make("span"); part.append(make("b", "", String(value)), " " + text); return part; }));
  if (run.reason) run.line.append(make("span", "", ENDS[run.reason] ?? run.reason));
}
function difference(isOver) {
  const [a, b] = state.runs.map((run) => run.steps), shared = Math.min(a.length, b.length);
  for (let i = 0; i < shared; i++) if (a[i].token !== b[i].token) return i;
  return isOver && a.length !== b.length ? shared : -1;
}
function markFirst(isOver) {
  if (state.first >= 0 || !state.runs.every(Boolean)) return;
  state.first = difference(isOver);
  if (state.first < 0) return;
  state.runs.forEach((run) => {
    const token = run.tokens.children[state.first];
    if (token) { token.classList.add("first"); token.tabIndex = 0; }
  });
}
function summary() {
  if (state.first < 0) return "Both wrote the same tokens.";
  const said = (run) => state.first < run.steps.length ? quoted(run.steps[state.first].token) : "the end";
  return "First difference at token " + (state.first + 1) + ": " + said(state.runs[0]) + " on the left, " + said(state.runs[1]) + " on the right.";
}

// Colour

function heat(step) {
  const measure = MEASURES[byId("measure").value];
  return measure ? measure[1](step) ?? 0 : 0;
}
function legend() {
  const measure = MEASURES[byId("measure").value];
  byId("legend-colour").hidden = !measure;
  byId("legend-measure").textContent = measure ? measure[0] + ", low to high" : "";
}
function recolour() {
  legend();
  for (const run of state.runs) if (run) run.steps.forEach((step, i) => run.tokens.children[i].style.setProperty("--v", String(heat(step))));
}

// One token

function describe(token) {
  const run = state.runs[Number(token.parentElement.dataset.side)], i = Number(token.dataset.index), step = run.steps[i], title = make("p");
  title.append(make("strong", "", "Token " + (i + 1)), " of " + run.strategy + ": " + quoted(step.token));
  const said = step.criticality === null ? [] : ["criticality " + number(step.criticality)];
  said.push(step.flip ? "triggered, flipped" : step.fired ? "triggered, kept the first choice" : "not triggered");
  const told = [title, make("p", "muted", said.join("; "))], all = step.candidates;
  if (step.flip) told.push(make("p", "", "The small model's first choice: " + quoted(step.greedy)));
  if (!all.length) return told;
  const columns = [["p_S", (one) => probability(Math.exp(one.logprob))]];
  if (all.some((one) => one.llm_prob !== null)) columns.push(["p_L", (one) => probability(one.llm_prob)]);
  if (all.some((one) => one.score !== null)) columns.push(["Score", (one) => score(one.score)]);
  const taken = all.findIndex((one) => one.selected);
  told.push(candidateTable(columns.map(([name]) => name), all.map((one) => [one.token, ...columns.map(([, read]) => read(one))]), taken));
  if (taken < 0) told.push(make("p", "", "The token that was taken is none of these."));
  return told;
}
const card = makeCard(byId("card"), describe);
const order = (token) => Number(token.dataset.index) * 2 + Number(token.parentElement.dataset.side);
function goToFlip(direction) {
  const flips = [...document.querySelectorAll(".tokens .tok.flip")].sort((a, b) => order(a) - order(b)), token = card.current();
  if (!flips.length) return;
  const at = token ? order(token) : direction > 0 ? -1 : Infinity;
  card.goTo((direction > 0 ? flips.find((flip) => order(flip) > at) : flips.findLast((flip) => order(flip) < at)) ?? flips.at(direction > 0 ? 0 : -1));
}

// Keys and buttons

function onKey(event) {
  const isTyping = event.target.matches("input, select, textarea");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) answer();
  else if (event.key === "Escape") { if (!byId("card").hidden) card.dismiss(); else stop(); }
  else if (!isTyping && !event.ctrlKey && !event.altKey && !event.metaKey && "np".includes(event.key)) goToFlip(event.key === "n" ? 1 : -1);
  else return;
  event.preventDefault();
}
function start() {
  byId("problem").value = EXAMPLES[0];
  fill(byId("measure"), [...Object.keys(MEASURES).map((name) => [name, name]), ["", "nothing"]], "criticality");
  byId("form").addEventListener("submit", (event) => { event.preventDefault(); answer(); });
  byId("stop").addEventListener("click", stop);
  byId("example").addEventListener("click", () => { state.example = (state.example + 1) % EXAMPLES.length; byId("problem").value = EXAMPLES[state.example]; });
  byId("measure").addEventListener("change", recolour);
  byId("key").addEventListener("change", connect);
  document.addEventListener("keydown", onKey);
  connect().catch((error) => say("The server cannot be reached: " + error.message, true));
}
start();
