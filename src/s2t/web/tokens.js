"use strict";
// What pages with tokens share: numbers and texts as a reader sees them, tokens, and the card that shows one of them.
// Model text is untrusted: it is written with textContent alone.

const byId = (id) => document.getElementById(id);
const isNarrow = matchMedia("(max-width: 46rem)");

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

// Tokens

function fillToken(token, text) {
  if (text === "") token.append(make("span", "ghost", "∅"));
  else for (const part of text.split(/(\n)/)) {
    if (part === "\n") token.append(make("span", "ghost", "⏎"), "\n");
    else if (part) token.append(part);
  }
}
function makeToken(classes, text, heat, index, isStop) {
  const token = make("span", ["tok", ...classes].filter(Boolean).join(" "));
  if (heat > 0.01) token.style.setProperty("--v", String(Math.min(1, heat)));
  token.dataset.index = String(index);
  token.setAttribute("role", "button");
  token.tabIndex = isStop ? 0 : -1;
  fillToken(token, text);
  return token;
}
function candidateTable(columns, rows, taken) {  // a row: its text, then its cells
  const table = make("table"), head = make("tr"), body = make("tbody"), thead = make("thead");
  ["", "Candidate", ...columns, "Taken"].forEach((name, i) => head.append(make("th", i === 1 ? "left" : "", name)));
  thead.append(head);
  rows.forEach(([text, ...cells], rank) => {
    const row = make("tr", rank === taken ? "chosen" : "");
    row.append(make("td", "", String(rank + 1)), make("td", "text", visible(text)), ...cells.map((cell) => make("td", "", cell)),
      make("td", "", rank === taken ? "✓" : ""));
    body.append(row);
  });
  table.append(thead, body);
  return table;
}
const tokenOf = (event) => event.target instanceof Element ? event.target.closest(".tokens .tok") : null;

// The card: `fill(token)` gives its title and what stands below

function makeCard(card, fill) {
  const held = { token: null, isPinned: false, hiding: 0 };
  function show(token, isPinned) {
    clearTimeout(held.hiding);
    if (held.token === token && held.isPinned === isPinned) return;
    hide();
    held.token = token;
    held.isPinned = isPinned;
    const head = make("div", "head"), close = make("button", "", "Close"), [title, ...rest] = fill(token);
    close.type = "button";
    close.addEventListener("click", dismiss);
    head.append(title);
    if (isPinned) head.append(close);
    card.replaceChildren(head, ...rest);
    card.classList.toggle("pinned", isPinned);
    card.hidden = false;
    document.body.classList.add("has-card");
    token.setAttribute("aria-describedby", card.id);
    token.setAttribute("aria-expanded", String(isPinned));
    place(token);
  }
  function place(token) {
    const box = token.getClientRects()[0], page = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(box.left, page - card.offsetWidth - 8));
    const fitsBelow = box.bottom + 8 + card.offsetHeight < window.innerHeight || box.top < card.offsetHeight + 8;
    card.style.left = (left + window.scrollX) + "px";
    card.style.top = ((fitsBelow ? box.bottom + 8 : box.top - card.offsetHeight - 8) + window.scrollY) + "px";
    if (held.isPinned || token.matches(":focus-visible")) reveal(token);  // not while a tap is still looking for its target
  }
  function reveal(token) {  // on a phone the card lies at the bottom, over what is there
    const hidden = token.getClientRects()[0].bottom + 12 - (window.innerHeight - card.offsetHeight);
    if (isNarrow.matches && hidden > 0) window.scrollBy(0, hidden);
  }
  function hide() {
    clearTimeout(held.hiding);
    if (held.token) ["aria-describedby", "aria-expanded"].forEach((name) => held.token.removeAttribute(name));
    held.token = null;
    held.isPinned = false;
    card.hidden = true;
    document.body.classList.remove("has-card");
  }
  function dismiss() {
    const token = held.token, hadFocus = card.contains(document.activeElement);
    hide();
    if (token && hadFocus) { token.focus({ preventScroll: true }); hide(); }
  }
  function hideSoon() {
    clearTimeout(held.hiding);
    if (!held.isPinned) held.hiding = setTimeout(hide, 150);
  }
  function toggle(token) {
    if (held.token === token && held.isPinned) hide();
    else show(token, true);
  }
  function goTo(token) {
    token.scrollIntoView({ block: "center" });
    token.focus({ preventScroll: true });
    reveal(token);
  }
  function walk(event) {
    const token = tokenOf(event);
    const next = { ArrowRight: "nextElementSibling", ArrowDown: "nextElementSibling", ArrowLeft: "previousElementSibling", ArrowUp: "previousElementSibling" };
    if (!token || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") toggle(token);
    else if (event.key in next) { if (token[next[event.key]]) token[next[event.key]].focus(); }
    else return;
    event.preventDefault();
  }
  function click(event) {
    const token = tokenOf(event);
    if (token) toggle(token);
    else if (event.target.isConnected && !card.contains(event.target)) hide();
  }
  document.addEventListener("mouseover", (event) => { const token = tokenOf(event); if (token && !held.isPinned) show(token, false); });
  document.addEventListener("mouseout", (event) => { if (tokenOf(event)) hideSoon(); });
  document.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token && token !== held.token) show(token, held.isPinned); });
  document.addEventListener("focusout", (event) => { if (tokenOf(event)) hideSoon(); });
  document.addEventListener("click", click);
  document.addEventListener("keydown", walk);
  card.addEventListener("mouseenter", () => clearTimeout(held.hiding));
  card.addEventListener("mouseleave", hideSoon);
  window.addEventListener("resize", hide);
  return { hide, dismiss, goTo, current: () => held.token || (document.activeElement.matches(".tokens .tok") ? document.activeElement : null) };
}
