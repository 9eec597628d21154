// The document, shaded by how many (layer, KV head) pairs kept each token.

const LEVELS = 10;

class KeptView {
  // Shows "kept" events. `elements`: layer, head (selects), tokens, summary, readout.
  constructor(elements) {
    Object.assign(this, elements);
    this.spans = [];
    this.current = -1;
    this.layer.addEventListener("change", () => { this.#listHeads(); this.#shade(); });
    this.head.addEventListener("change", () => this.#shade());
    this.tokens.addEventListener("keydown", (event) => this.#onKey(event));
    this.tokens.addEventListener("focus", () => { if (this.current < 0) this.#move(0); });
    // Not "pointerover": that comes, too, when the arrow keys scroll the text under a pointer that rests.
    for (const kind of ["pointermove", "click"]) {
      this.tokens.addEventListener(kind, (event) => {
        const index = Number(event.target.dataset.index ?? -1);
        if (index >= 0 && index !== this.current) this.#move(index, false);
      });
    }
  }

  show(event) {
    this.event = event;
    this.bits = Uint8Array.from(atob(event.bits), (character) => character.charCodeAt(0));
    this.firstPair = [];
    let pairs = 0;
    for (const heads of event.heads) {
      this.firstPair.push(pairs);
      pairs += heads;
    }
    const chosen = [this.layer.value, this.head.value];
    fill(this.layer, ["all", ...event.heads.keys()]);
    choose(this.layer, chosen[0]);
    this.#listHeads();
    choose(this.head, chosen[1]);
    this.#write();
    this.#shade();
  }

  #listHeads() {
    const chosen = this.head.value;
    const layer = this.layer.value;
    const heads = layer === "all" ? Math.max(...this.event.heads) : this.event.heads[Number(layer)];
    fill(this.head, ["all", ...Array(heads).keys()]);
    choose(this.head, chosen);
  }

  #write() {
    const { tokens, offsets, document_offset: begin } = this.event;
    this.current = -1;
    this.tokens.removeAttribute("aria-activedescendant");
    this.readout.textContent = "No token chosen.";
    this.spans = tokens.map((text, index) => {
      const span = document.createElement("span");
      span.textContent = text;
      span.id = `token-${index}`;
      span.dataset.index = index;
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      span.dataset.frame = offsets[index] + text.length <= begin ? "frame" : "";
      return span;
    });
    this.tokens.replaceChildren(...this.spans);
    this.tokens.scrollTop = 0;
  }

  #pairs() {
    const { heads } = this.event;
    const pairs = [];
    heads.forEach((count, layer) => {
      if (this.layer.value !== "all" && Number(this.layer.value) !== layer) return;
      for (let head = 0; head < count; head += 1) {
        if (this.head.value === "all" || Number(this.head.value) === head) pairs.push(this.firstPair[layer] + head);
      }
    });
    return pairs;
  }

  #count(pairs) {
    if (pairs.length === this.event.pairs) return this.event.counts;
    const rowBytes = Math.ceil(this.spans.length / 8);
    return this.spans.map((_, token) => {
      let count = 0;
      for (const pair of pairs) count += (this.bits[pair * rowBytes + (token >> 3)] >> (token & 7)) & 1;
      return count;
    });
  }

  #shade() {
    const pairs = this.#pairs();
    this.most = pairs.length;
    this.counts = this.#count(pairs);
    this.spans.forEach((span, index) => {
      const share = this.counts[index] / this.most;
      const level = Math.ceil(Math.sqrt(share) * LEVELS); // most tokens are kept by few pairs: these shall differ, too
      span.className = `k${level} ${span.dataset.frame}`.trim();
      span.dataset.count = this.counts[index];
    });
    this.#summarise();
    if (this.current >= 0) this.#move(this.current, false);
  }

  #summarise() {
    const total = this.counts.length;
    const sum = this.counts.reduce((before, count) => before + count, 0);
    const none = this.counts.filter((count) => count === 0).length;
    const all = this.counts.filter((count) => count === this.most).length;
    const share = ((100 * sum) / (total * this.most)).toFixed(0);
    this.summary.textContent =
      this.most === 1
        ? `${total} tokens, of which this head keeps ${all} (${share} %).`
        : `${total} tokens, ${this.most} (layer, KV head) pairs, ${share} % kept. ` +
          `Kept by all pairs: ${all} tokens; by none: ${none}.`;
  }

  // Makes a token the current one; `scroll` brings it into view.
  #move(index, scroll = true) {
    const before = this.spans[this.current];
    if (before) {
      before.classList.remove("current");
      before.setAttribute("aria-selected", "false");
      before.removeAttribute("aria-label");
    }
    this.current = index;
    const span = this.spans[index];
    if (!span) return;
    const text = this.event.tokens[index];
    const words = `${quote(text)}: kept by ${this.counts[index]} of ${this.most}`;
    span.classList.add("current");
    span.setAttribute("aria-selected", "true");
    span.setAttribute("aria-label", words);
    span.title = words;
    this.tokens.setAttribute("aria-activedescendant", span.id);
    this.readout.textContent = `Token ${index}, ${words}.`;
    if (scroll) span.scrollIntoView({ block: "nearest" });
  }

  #onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.spans.length) return;
    const last = this.spans.length - 1;
    const at = Math.max(this.current, 0);
    const targets = {
      ArrowRight: () => Math.min(at + 1, last),
      ArrowLeft: () => Math.max(at - 1, 0),
      ArrowDown: () => this.#line(at, 1),
      ArrowUp: () => this.#line(at, -1),
      PageDown: () => Math.min(at + 100, last),
      PageUp: () => Math.max(at - 100, 0),
      Home: () => 0,
      End: () => last,
    };
    if (!targets[event.key]) return;
    event.preventDefault();
    this.#move(targets[event.key]());
  }

  // The token of the next or the previous line that stands nearest below or above.
  #line(at, step) {
    const from = this.spans[at];
    let best = at;
    let top = null;
    for (let index = at + step; index >= 0 && index < this.spans.length; index += step) {
      const span = this.spans[index];
      if (span.offsetTop === from.offsetTop || !span.textContent) continue;
      top ??= span.offsetTop;
      if (span.offsetTop !== top) break;
      const distance = Math.abs(span.offsetLeft - from.offsetLeft);
      if (best === at || distance < Math.abs(this.spans[best].offsetLeft - from.offsetLeft)) best = index;
    }
    return best;
  }
}

function fill(select, values) {
  select.replaceChildren(...values.map((value) => new Option(value, value)));
}

function choose(select, value) {
  if ([...select.options].some((option) => option.value === value)) select.value = value;
}

function quote(text) {
  return text ? `“${text.replaceAll("\n", "↵")}”` : "a part of the next character";
}
