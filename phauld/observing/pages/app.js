"use strict";
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let chosen = location.hash.slice(1), shown = "";

// Text only ever becomes text: nothing that a process is called is read as HTML.
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.filter((each) => each !== null && each !== ""));
  return element;
}
function draw(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}
function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < 4) { number /= 1024; unit += 1; }
  return `${unit === 0 || number >= 100 ? Math.round(number) : number.toFixed(1)} ${units[unit]}`;
}
function time(ms) {
  if (ms === null) return "–";
  return ms < 1000 ? `${Math.round(ms)} ms` : ms < 60000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.floor(ms / 60000)} min ${Math.round(ms / 1000) % 60} s`;
}
const what = (each) => each.workload || `${each.process_name || each.source?.process_name || "process"} (${each.source_pid})`;
const where = (each) => each.destination_name || each.destination;
const tone = (outcome) => ({ moved: "ok", failed: "bad", "in-doubt": "bad" })[outcome] || "warn";
const words = (phase) => (phase || "starting").replaceAll("-", " ").replaceAll("_", " ");
const fact = (name, value) => make("span", {}, `${name} `, make("b", {}, value));

function card(each) {
  const facts = [fact("sent", each.bytes_total > each.bytes ? `${bytes(each.bytes)} of ${bytes(each.bytes_total)}` : bytes(each.bytes))];
  if (each.rate_bytes_per_second) facts.push(fact("rate", `${bytes(each.rate_bytes_per_second)}/s`));
  if (each.rounds) facts.push(fact("rounds", each.rounds));
  if (each.expected_pause_ms !== null) facts.push(fact("expected pause", time(each.expected_pause_ms)));
  if (each.pages_missing) facts.push(fact("pages to come", each.pages_missing));
  if (each.total_ms !== null) facts.push(fact("for", time(each.total_ms)));
  const bar = make("progress", { max: Math.max(each.bytes_total, 1), value: Math.min(each.bytes, each.bytes_total), "aria-label": "bytes sent" });
  return make("div", { class: "card" },
    make("div", { class: "top" }, make("strong", {}, `${what(each)} → ${where(each)}`),
      make("span", { class: `badge ${each.in_doubt ? "bad" : ""}` }, words(each.phase) + (each.in_doubt ? ", in doubt" : "")),
      each.mode || "", make("code", {}, each.migration_id)),
    bar, make("p", { class: "facts" }, ...facts), each.status_text ? make("p", { class: "quiet" }, each.status_text) : "");
}
function row(each) {
  const line = make("tr", { tabindex: "0", "aria-expanded": "false", "data-id": each.migration_id },
    make("td", { class: "name", title: what(each) }, what(each)), make("td", { class: "name", title: each.destination }, where(each)),
    make("td", { class: tone(each.outcome), title: each.error || "" }, words(each.outcome)), make("td", { class: "more" }, each.mode || "–"),
    make("td", { class: "n" }, time(each.pause_ms)), make("td", { class: "n more" }, time(each.total_ms)),
    make("td", { class: "n more" }, bytes(each.bytes)), make("td", { class: "more" }, new Date(each.finished_at).toLocaleString([], { dateStyle: "short", timeStyle: "medium" })));
  const choose = () => { chosen = chosen === each.migration_id ? "" : each.migration_id; history.replaceState(null, "", `#${chosen}`); detail(); };
  line.addEventListener("click", choose);
  line.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); } });
  return line;
}
function timeline(steps, width) {
  const nodes = [...new Set(steps.map((step) => step.node_name))];
  const known = steps.filter((step) => step.end_ms !== null);
  const end = Math.max(1, ...known.map((step) => step.end_ms)), left = 150, scale = (width - left - 46) / end, most = width < 600 ? 2.5 : 4;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${known.length * 26 + 26}`, role: "img" });
  svg.append(draw("title", {}, "steps of the freeze"));
  const power = 10 ** Math.floor(Math.log10(end / most));
  const step = Math.max(...[1, 2, 5].map((factor) => factor * power).filter((each) => each <= end / most));
  for (let tick = 0; tick * step <= end; tick += 1) {
    const x = left + tick * step * scale;
    svg.append(draw("line", { x1: x, x2: x, y1: 0, y2: known.length * 26 }), draw("text", { x, y: known.length * 26 + 18, "text-anchor": "middle" }, `${Math.round(tick * step * 1000) / 1000}`));
  }
  known.forEach((step, number) => {
    const x = left + step.start_ms * scale, width = Math.max((step.end_ms - step.start_ms) * scale, 2), y = number * 26;
    svg.append(draw("text", { class: "label", x: left - 10, y: y + 17, "text-anchor": "end" }, step.name),
      draw("rect", { class: `c${nodes.indexOf(step.node_name) % 2}`, x, y: y + 5, width, height: 16, rx: 3 }),
      draw("text", { x: x + width + 6, y: y + 17 }, (step.end_ms - step.start_ms).toFixed(1)));
  });
  return [make("p", { class: "facts" }, ...nodes.map((node, index) => make("span", { class: `key k${index % 2}` }, node)), "milliseconds from the start of the freeze"), svg];
}
async function detail() {
  const line = chosen && document.querySelector(`#finished tr[data-id="${CSS.escape(chosen)}"]`);
  for (const each of document.querySelectorAll("#finished tr[data-id]")) { each.classList.toggle("chosen", each === line); each.setAttribute("aria-expanded", each === line); }
  if (!line) { $("detail")?.remove(); shown = ""; return; }
  if (shown === chosen && $("detail")) return;
  const answer = await fetch(`/api/migrations/${encodeURIComponent(chosen)}`);
  if (!answer.ok) return;
  const each = await answer.json();
  if (each.migration_id !== chosen) return;
  shown = chosen;
  const parts = [make("div", { class: "top" }, make("strong", {}, `${what(each)} → ${where(each)}`), make("span", { class: `badge ${tone(each.outcome)}` }, words(each.outcome)),
    make("a", { href: `/migrations/${encodeURIComponent(each.migration_id)}/report` }, "report"), make("code", {}, each.migration_id))];
  if (each.error) parts.push(make("p", { class: "bad" }, `${each.error.reason}: ${each.error.message}`), each.error.remedy ? make("p", { class: "quiet" }, `remedy: ${each.error.remedy}`) : "");
  const facts = [fact("mode", each.mode || "–"), fact("restore", each.restore_mode || "–"), fact("rounds", each.rounds.length), fact("sent", bytes(each.bytes)), fact("pause", time(each.pause_ms)), fact("total", time(each.total_ms))];
  if (each.expected_pause_ms !== null) facts.push(fact("expected", time(each.expected_pause_ms)));
  facts.push(fact("ended", new Date(each.finished_at).toLocaleString()));
  parts.push(make("p", { class: "facts" }, ...facts), make("p", { class: "quiet" }, each.mode_reason));
  $("detail")?.remove();
  const card = make("div", { class: "card" }, ...parts.filter(Boolean));
  const cells = [...line.children].filter((cell) => getComputedStyle(cell).display !== "none").length;
  line.after(make("tr", { id: "detail" }, make("td", { colspan: cells }, card)));
  if (each.timeline.length) card.append(...timeline(each.timeline, Math.max(300, card.clientWidth - 36)));
}
function show(state) {
  const node = state.node, running = state.migrations.filter((each) => !each.finished_at), over = state.migrations.filter((each) => each.finished_at);
  document.title = `${running.length ? `(${running.length}) ` : ""}phaul on ${node.name}`;
  $("name").textContent = `on ${node.name}`;
  $("state").textContent = node.draining ? "stopping" : node.insecure ? "serving, without TLS" : "serving";
  $("state").className = `badge ${node.draining || node.insecure ? "warn" : "ok"}`;
  $("facts").textContent = `out ${node.outgoing}/${node.outgoing_limit} · in ${node.incoming}/${node.incoming_limit} · ${bytes(node.memory_available_bytes)} memory · phaul ${node.version} · criu ${node.criu} · Linux ${node.kernel}`;
  $("active").replaceChildren(...(running.length ? running.map(card) : [make("p", { class: "quiet" }, "Nothing is moving from here.")]));
  $("incoming-section").hidden = !state.sessions.length;
  $("incoming").replaceChildren(...state.sessions.map((each) => make("tr", {}, make("td", { class: "name", title: each.workload }, each.workload || "process"), make("td", {}, each.filling ? "filling" : words(each.phase)),
    make("td", { class: "n" }, each.bytes_received ? bytes(each.bytes_received) : "–"), make("td", { class: "n" }, each.rounds), make("td", { class: "more" }, make("code", {}, each.migration_id)))));
  $("list").hidden = !over.length; $("none").hidden = over.length > 0;
  const signature = JSON.stringify(over.map((each) => each.migration_id));
  if ($("finished").dataset.signature !== signature) { $("finished").dataset.signature = signature; shown = ""; $("finished").replaceChildren(...over.map(row)); }
  if (chosen) detail();
  return running.length + state.sessions.length > 0;
}
async function poll() {
  let busy = false;
  try {
    const answer = await fetch("/api/state");
    if (!answer.ok) throw new Error(answer.status);
    busy = show(await answer.json());
  } catch { $("state").textContent = "no answer"; $("state").className = "badge bad"; }
  setTimeout(poll, document.hidden ? 5000 : busy ? 300 : 1000);
}
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; shown = ""; detail(); } });
poll();
