// Sliders, the answer's tokens, the list of passages, and the search.

class Controls {
  constructor(trace, view, onChange) {
    Object.assign(this, { trace, view, onChange });
    this.step = document.getElementById("step");
    this.layer = document.getElementById("layer");
    this.step.max = trace.numSteps;
    this.layer.max = trace.numLayers;
    this.step.disabled = !trace.numSteps;
    this.layer.disabled = !trace.numLayers;
    this.step.addEventListener("input", () => this.set({ step: Number(this.step.value) - 1 }));
    this.layer.addEventListener("input", () => this.set({ layer: Number(this.layer.value) - 1 }));
    this.buttons = this.makeAnswer();
    this.show();
  }

  makeAnswer() {
    const buttons = [];
    for (let s = 0; s < this.trace.numTokens - this.trace.numPrompt; s++) {
      const button = element("button", textOf(this.trace, this.trace.numPrompt + s, this.trace.numPrompt + s + 1)
        .replace(/\n/g, "↵"));
      button.type = "button";
      button.disabled = s >= this.trace.numSteps; // not recorded
      button.addEventListener("click", () => this.set({ step: this.view.step === s ? -1 : s }));
      buttons.push(button);
    }
    document.getElementById("answer").replaceChildren(...buttons);
    return buttons;
  }

  set(change) {
    Object.assign(this.view, change);
    this.show();
    this.onChange();
  }

  move(name, by) {
    const count = name === "step" ? this.trace.numSteps : this.trace.numLayers;
    this.set({ [name]: Math.min(count - 1, Math.max(-1, this.view[name] + by)) });
  }

  show() {
    const { step, layer } = this.view, { trace } = this;
    this.step.value = step + 1;
    this.layer.value = layer + 1;
    const stepName = step < 0 ? "all" : `${step + 1} of ${trace.numSteps}: ${quoted(trace, trace.numPrompt + step)}`;
    const layerName = layer < 0 ? "all" : `${trace.layers[layer]}`;
    document.getElementById("step-name").textContent = stepName;
    document.getElementById("layer-name").textContent = layerName;
    this.step.setAttribute("aria-valuetext", stepName);
    this.layer.setAttribute("aria-valuetext", layerName);
    this.buttons.forEach((button, s) => button.setAttribute("aria-pressed", s === step));
  }
}

function showPassages(root, trace, ranked, onToken) {
  root.replaceChildren(...ranked.slice(0, 6).map((passage) => {
    const button = element("button");
    button.type = "button";
    const bar = element("i");
    bar.style.width = `${(passage.score / ranked[0].score) * 100}%`;
    bar.style.backgroundColor = heatColour(Math.sqrt(passage.score / ranked[0].score));
    const text = textOf(trace, passage.start, passage.end).trim().replace(/\s+/g, " ");
    const place = `token ${thousands(passage.start)} · depth ${percent(depthOf(trace, passage.start), 0)} · ${passage.score.toFixed(3)}`;
    button.append(bar, element("span", text.slice(0, 400)), element("small", place));
    button.addEventListener("click", () => onToken(passage.peak));
    const item = element("li");
    item.append(button);
    return item;
  }));
}

// Finds text, the next one at every call; says how deep it lies and how hot its passage is.
class Finder {
  constructor(trace, form, onFound) {
    Object.assign(this, { trace, onFound, from: 0, last: "" });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.find(form.elements.query.value);
    });
  }

  find(query) {
    if (!query) return;
    if (query !== this.last) [this.from, this.last] = [0, query];
    let at = this.trace.text.indexOf(query, this.from);
    if (at < 0) at = this.trace.text.indexOf(query);
    if (at < 0) return this.onFound(null);
    this.from = at + 1;
    this.onFound([tokenAt(this.trace, at), tokenAt(this.trace, at + query.length - 1) + 1]);
  }
}

function describeFound(trace, ranked, span) {
  if (!span) return "not found";
  const rank = ranked.findIndex((passage) => passage.start <= span[0] && span[0] < passage.end);
  const place = `token ${thousands(span[0])}, depth ${percent(depthOf(trace, span[0]))}`;
  return `${place}: ${rank < 0 ? "its passage was not selected" : `its passage is number ${rank + 1} of ${ranked.length} selected`}`;
}
