// The text. All of it is in the page as plain text, so that the browser can find in it; tokens get elements of their
// own only near what is seen.

const FEWEST_TOKENS = 40, MANY_TOKENS = 160, MOST_TOKENS = 240;

// Where the pieces of text begin that are laid out together: they end at the end of a line, or else of a sentence.
function cutChunks(trace) {
  const starts = [0], sentences = new Set(trace.bounds);
  for (let token = 1; token < trace.numTokens; token++) {
    const length = token - starts.at(-1);
    const isLine = textOf(trace, token - 1, token).includes("\n") && !textOf(trace, token, token + 1).startsWith("\n");
    const isEnd = isLine ? length >= FEWEST_TOKENS : sentences.has(token) && length >= MANY_TOKENS;
    if (token === trace.numPrompt || isEnd || length >= MOST_TOKENS) starts.push(token);
  }
  return [...starts, trace.numTokens];
}

class TextView {
  constructor(root, trace, onToken) {
    Object.assign(this, { root, trace, onToken, heat: null, top: 0, cursor: -1, marked: trace.marked });
    this.starts = cutChunks(trace);
    this.chunks = [];
    this.near = new Set();
    this.observer = new IntersectionObserver((entries) => this.seen(entries), { root, rootMargin: "600px" });
    this.build();
    root.addEventListener("pointerover", (event) => this.point(event, false));
    root.addEventListener("click", (event) => this.point(event, true));
  }

  build() {
    const fragment = document.createDocumentFragment();
    for (let c = 0; c + 1 < this.starts.length; c++) {
      const start = this.starts[c];
      const chunk = document.createElement("div"), gutter = document.createElement("div");
      const words = document.createElement("div");
      chunk.className = start >= this.trace.numPrompt ? "chunk written" : "chunk";
      gutter.className = "gutter";
      words.className = "words";
      gutter.textContent = start >= this.trace.numPrompt ? "answer" : thousands(start);
      gutter.title = `depth ${percent(depthOf(this.trace, start))}`;
      words.textContent = textOf(this.trace, start, this.starts[c + 1]);
      chunk.append(gutter, words);
      chunk.dataset.index = c;
      this.chunks.push({ chunk, words, filled: false });
      fragment.append(chunk);
      this.observer.observe(chunk);
    }
    this.root.replaceChildren(fragment);
  }

  seen(entries) {
    for (const entry of entries) {
      const c = Number(entry.target.dataset.index);
      if (entry.isIntersecting) {
        this.near.add(c);
        this.fill(c);
      } else if (this.near.delete(c)) {
        this.empty(c);
      }
    }
  }

  fill(c) {
    if (!this.chunks[c].filled) {
      const spans = [];
      for (let token = this.starts[c]; token < this.starts[c + 1]; token++) {
        const span = document.createElement("span");
        span.dataset.token = token;
        span.textContent = textOf(this.trace, token, token + 1);
        spans.push(span);
      }
      this.chunks[c].words.replaceChildren(...spans);
      this.chunks[c].filled = true;
    }
    this.paint(c);
  }

  empty(c) {
    this.chunks[c].words.textContent = textOf(this.trace, this.starts[c], this.starts[c + 1]);
    this.chunks[c].filled = false;
  }

  paint(c) {
    for (const span of this.chunks[c].words.children) {
      const token = Number(span.dataset.token);
      const t = intensity(this.heat[token], this.top);
      span.style.backgroundColor = t > 0 ? heatColour(t) : "";
      span.style.color = inkOn(t);
      const isMarked = this.marked && token >= this.marked[0] && token < this.marked[1];
      span.className = `${token === this.cursor ? "cursor " : ""}${isMarked ? "marked " : ""}${
        this.always(token) ? "always" : ""}`;
    }
  }

  show(heat, top, always) {
    Object.assign(this, { heat, top, always });
    this.near.forEach((c) => this.fill(c));
  }

  repaint() {
    this.near.forEach((c) => this.paint(c));
  }

  point(event, isClick) {
    const token = event.target.dataset?.token;
    if (token !== undefined) this.onToken(Number(token), isClick);
  }

  setCursor(token) {
    this.cursor = token;
    this.repaint();
  }

  chunkOf(token) {
    let low = 0, high = this.starts.length - 2;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts[middle] <= token) low = middle; else high = middle - 1;
    }
    return low;
  }

  scrollTo(token) {
    const c = this.chunkOf(token);
    const reach = () => {
      this.near.add(c);
      this.fill(c);
      const span = this.chunks[c].words.children[token - this.starts[c]];
      (span ?? this.chunks[c].chunk).scrollIntoView({ block: "center" });
    };
    reach();
    requestAnimationFrame(reach); // heights on the way were estimates until now
  }

  // First and last token in sight.
  visible() {
    const top = this.root.scrollTop, bottom = top + this.root.clientHeight;
    const at = (edge) => {
      let low = 0, high = this.chunks.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (this.chunks[middle].chunk.offsetTop - this.root.offsetTop <= edge) low = middle; else high = middle - 1;
      }
      const { chunk } = this.chunks[low];
      const share = (edge - (chunk.offsetTop - this.root.offsetTop)) / Math.max(1, chunk.offsetHeight);
      const length = this.starts[low + 1] - this.starts[low];
      return this.starts[low] + Math.round(Math.min(1, Math.max(0, share)) * length);
    };
    return [at(top), at(bottom)];
  }
}
