// The form, the two answers, and the stream of events that fills them.

const byId = (id) => document.getElementById(id);
const form = byId("form");
const view = new KeptView({
  layer: byId("layer"),
  head: byId("head"),
  tokens: byId("tokens"),
  summary: byId("summary"),
  readout: byId("readout"),
});

let running = null; // AbortController of the question that is being answered
let methods = new Map();

// ---- requests -----------------------------------------------------------------------------------------------------

class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const key = byId("key").value.trim();
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ServerError(response.status, body?.error?.message ?? `the server answered ${response.status}`);
}

// The JSON of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function loadOptions() {
  try {
    const options = await (await request("playground/options")).json();
    showOptions(options);
    return true;
  } catch (error) {
    if (error.status === 503) {
      setTimeout(loadOptions, 1500);
      byId("status").textContent = `Not ready yet: ${error.message}.`;
    } else {
      showError(error);
    }
    return false;
  }
}

function showOptions(options) {
  methods = new Map(options.methods.map(({ name, summary }) => [name, summary]));
  byId("method").replaceChildren(...[...methods.keys()].map((name) => new Option(name, name)));
  byId("model").textContent = `The model is ${options.model}.`;
  byId("document-help").textContent = `Up to ${options.max_document_tokens.toLocaleString("en")} tokens.`;
  byId("length").max = options.max_new_tokens;
  byId("ratio").value = Math.round(100 * options.ratio);
  byId("status").textContent = "";
  showMethod();
  showRatio();
}

// ---- the form -----------------------------------------------------------------------------------------------------

function showMethod() {
  const summary = methods.get(byId("method").value);
  byId("method-help").textContent = summary ? `${summary}.` : "";
}

function showRatio() {
  const value = byId("ratio").value;
  byId("ratio-value").textContent = `${value} %`;
  byId("ratio").setAttribute("aria-valuetext", `${value} percent kept`);
}

function showError(error) {
  if (error.name === "AbortError") return;
  byId("error").textContent = error.message;
  if (error.status === 401) {
    byId("key-field").hidden = false;
    byId("key").focus();
  }
}

function setRunning(controller) {
  running = controller;
  byId("ask").disabled = running !== null;
  byId("stop").disabled = running === null;
}

async function ask() {
  if (running || !form.reportValidity()) return;
  byId("error").textContent = "";
  setRunning(new AbortController());
  try {
    if (!methods.size && !(await loadOptions())) return;
    for (const side of Object.values(sides)) side.begin();
    sides.compressed.state("Compressing the document …");
    sides.full.state("Waits for its turn.");
    byId("status").textContent = "Asking …";
    const response = await request("playground/ask", {
      method: "POST",
      signal: running.signal,
      headers: { "content-type": "application/json" },
      body: JSON.stringify(question()),
    });
    for await (const event of events(response)) take(event);
    byId("status").textContent = "Done.";
  } catch (error) {
    byId("status").textContent = error.name === "AbortError" ? "Stopped." : "";
    showError(error);
  } finally {
    setRunning(null);
    for (const side of Object.values(sides)) side.end();
  }
}

function question() {
  return {
    document: byId("document").value,
    question: byId("question").value,
    method: byId("method").value,
    ratio: Number(byId("ratio").value) / 100,
    max_new_tokens: Number(byId("length").value),
  };
}

// ---- the answers --------------------------------------------------------------------------------------------------

class Side {
  constructor(root) {
    this.part = (name) => root.querySelector(`.${name}`);
    this.title = root.querySelector("h3").textContent;
  }

  begin() {
    this.part("answer").textContent = "";
    this.part("answer").setAttribute("aria-busy", "true"); // read out as a whole, when it is complete
    for (const name of ["ttft", "speed", "memory"]) this.part(name).textContent = "–";
    this.meter(0, "not known yet");
    this.state("");
  }

  write(text) {
    this.part("answer").textContent += text;
    this.state("Answering …");
  }

  state(text) {
    this.part("state").textContent = text;
  }

  meter(percent, words) {
    const bar = this.part("bar");
    bar.setAttribute("aria-valuenow", percent.toFixed(0));
    bar.setAttribute("aria-valuetext", words);
    bar.firstElementChild.style.width = `${percent}%`;
  }

  done(event) {
    const percent = (100 * event.kv_bytes) / event.kv_bytes_full;
    const again = event.ttft_again === null ? "" : ` (a next question: ${seconds(event.ttft_again)})`;
    const memory = `${bytes(event.kv_bytes)} of ${bytes(event.kv_bytes_full)}, ${percent.toFixed(0)} %`;
    this.part("ttft").textContent = seconds(event.ttft) + again;
    this.part("speed").textContent =
      event.tokens_per_second === null ? "–" : `${event.tokens_per_second.toFixed(1)} tokens/s`;
    this.part("memory").textContent = memory;
    this.meter(Math.min(percent, 100), memory);
    this.state(
      `${event.kept_tokens} of ${event.prompt_tokens} tokens kept per layer and head; ${event.output_tokens} generated` +
        (event.finish_reason === "length" ? ", cut off there." : "."),
    );
    this.end();
  }

  end() {
    this.part("answer").setAttribute("aria-busy", "false");
    if (/…$|turn\.$/.test(this.part("state").textContent)) this.state("");
  }
}

const sides = { compressed: new Side(byId("compressed")), full: new Side(byId("full")) };

function take(event) {
  if (event.error) throw new ServerError(0, event.error.message);
  if (event.kind === "kept") {
    byId("kept").hidden = false;
    view.show(event);
    sides.compressed.state(`Document compressed in ${seconds(event.seconds)}; answering …`);
  } else if (event.kind === "text") {
    sides[event.side].write(event.text);
  } else if (event.kind === "done") {
    sides[event.side].done(event);
  } else if (event.kind === "failed") {
    sides[event.side].state(`Not answered: ${event.message}`);
  }
  if (event.side === "compressed" && event.kind !== "text") sides.full.state("Reading the document …");
}

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${(1000 * value).toFixed(0)} ms` : `${value.toFixed(2)} s`;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let value = count;
  for (; value >= 1024 && unit < units.length - 1; unit += 1) value /= 1024;
  return `${value.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

// ---- the sample ---------------------------------------------------------------------------------------------------

function sample() {
  const weather = ["Rain in the morning", "A light wind from the west", "Fog until noon", "A clear sky", "Snow on the hills"];
  const goods = ["salt", "timber", "dried fish", "rope", "wool", "tar", "barley"];
  const entries = [];
  for (let day = 1; day <= 30; day += 1) {
    const cargo = `${((day * 7) % 40) + 4} barrels of ${goods[(day * 3) % goods.length]}`;
    entries.push(`Day ${day}. ${weather[(day * 3) % weather.length]}. ${cargo} came in and went to the lower store.`);
  }
  entries.splice(13, 0, "The key to the lighthouse lies under the blue boat.");
  byId("document").value = `The ledger of the harbour.\n\n${entries.join("\n")}\n`;
  byId("question").value = "Where is the key to the lighthouse?";
}

async function openFile() {
  const file = byId("file").files[0];
  if (file) byId("document").value = await file.text();
}

// ---- what happens when --------------------------------------------------------------------------------------------

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("sample").addEventListener("click", sample);
byId("file").addEventListener("change", () => openFile().catch(showError));
byId("method").addEventListener("change", showMethod);
byId("ratio").addEventListener("input", showRatio);
byId("key").addEventListener("change", () => { if (!methods.size) loadOptions(); });
showRatio();
loadOptions();
