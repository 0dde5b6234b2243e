// The whole context at a glance, on one canvas; it lies down on narrow screens.

class Minimap {
  constructor(canvas, trace, onJump) {
    Object.assign(this, { canvas, trace, onJump, bins: null, top: 0, seen: [0, 0] });
    canvas.setAttribute("aria-valuemax", trace.numTokens - 1);
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.jump(event);
    });
    canvas.addEventListener("pointermove", (event) => event.buttons && this.jump(event));
    canvas.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  get lies() {
    return this.canvas.clientWidth > this.canvas.clientHeight;
  }

  get length() {
    return Math.max(1, this.lies ? this.canvas.clientWidth : this.canvas.clientHeight);
  }

  jump(event) {
    const box = this.canvas.getBoundingClientRect();
    const share = this.lies ? (event.clientX - box.left) / box.width : (event.clientY - box.top) / box.height;
    this.onJump(Math.round(Math.min(1, Math.max(0, share)) * (this.trace.numTokens - 1)));
  }

  press(event) {
    const last = this.trace.numTokens - 1, page = Math.max(1, this.seen[1] - this.seen[0]);
    const middle = Math.round((this.seen[0] + this.seen[1]) / 2);
    const targets = {
      ArrowUp: middle - page / 2, ArrowLeft: middle - page / 2, ArrowDown: middle + page / 2,
      ArrowRight: middle + page / 2, PageUp: middle - last / 20, PageDown: middle + last / 20, Home: 0, End: last,
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    this.onJump(Math.round(Math.min(last, Math.max(0, targets[event.key]))));
  }

  show(heat, top, marked) {
    Object.assign(this, { heat, top, marked });
    this.resize();
  }

  resize() {
    if (!this.heat) return;
    this.bins = binned(this.heat, Math.round(this.length));
    this.draw();
  }

  look(seen) {
    this.seen = seen;
    this.canvas.setAttribute("aria-valuenow", seen[0]);
    const depth = percent(depthOf(this.trace, seen[0]), 0);
    this.canvas.setAttribute("aria-valuetext", `token ${thousands(seen[0])}, depth ${depth}`);
    this.draw();
  }

  draw() {
    if (!this.bins) return;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const context = prepareCanvas(this.canvas, width, height);
    const bar = (from, to, colour, inset = 0, depth = this.lies ? height : width) => {
      context.fillStyle = colour;
      if (this.lies) context.fillRect(from, inset, to - from, depth - inset);
      else context.fillRect(inset, from, depth - inset, to - from);
    };
    this.bins.forEach((value, i) => {
      const t = intensity(value, this.top);
      if (t > 0) bar(i, i + 1.5, heatColour(t), 8);
    });
    const place = (token) => (token / this.trace.numTokens) * this.length;
    if (this.marked) bar(place(this.marked[0]) - 1, Math.max(place(this.marked[1]), place(this.marked[0]) + 2), cssColour("--mark"), 0, 7);
    bar(place(this.trace.numPrompt), this.length, cssColour("--accent"), 0, 7);
    context.strokeStyle = cssColour("--ink");
    context.lineWidth = 1.5;
    const from = place(this.seen[0]), extent = Math.max(6, place(this.seen[1]) - from);
    if (this.lies) context.strokeRect(from, 1, extent, height - 2);
    else context.strokeRect(1, from, width - 2, extent);
  }
}
