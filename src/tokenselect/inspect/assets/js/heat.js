// How strongly tokens were voted for, in the tokens written and the layers that are looked at; -1 means all of them.

function* cellsOf(trace, step, layer) {
  const steps = step < 0 ? [0, trace.numSteps] : [step, step + 1];
  const layers = layer < 0 ? [0, trace.numLayers] : [layer, layer + 1];
  for (let s = steps[0]; s < steps[1]; s++) {
    for (let l = layers[0]; l < layers[1]; l++) yield s * trace.numLayers + l;
  }
}

// The strongest vote that each token got.
function heatOf(trace, step, layer) {
  const heat = new Float32Array(trace.numTokens);
  for (const cell of cellsOf(trace, step, layer)) {
    for (let i = trace.startLoc[cell]; i < trace.startLoc[cell + 1]; i++) {
      const token = trace.indices[i];
      if (trace.votes[i] > heat[token]) heat[token] = trace.votes[i];
    }
  }
  return heat;
}

// Where one token was selected: [{cell, entry, vote}], the strongest first.
function selectionsOf(trace, token, step, layer) {
  const found = [];
  for (const cell of cellsOf(trace, step, layer)) {
    let low = trace.startLoc[cell], high = trace.startLoc[cell + 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (trace.indices[middle] < token) low = middle + 1; else high = middle;
    }
    if (low < trace.startLoc[cell + 1] && trace.indices[low] === token) {
      found.push({ cell, entry: low, vote: trace.votes[low] });
    }
  }
  return found.sort((a, b) => b.vote - a.vote);
}

// Passages by the strongest votes of their three strongest tokens, as the command line ranks them.
function rankPassages(trace, heat) {
  const ranked = [];
  for (let p = 0; p + 1 < trace.bounds.length; p++) {
    const [start, end] = [trace.bounds[p], trace.bounds[p + 1]];
    const top = [0, 0, 0];
    let peak = start;
    for (let token = start; token < end; token++) {
      if (heat[token] > heat[peak]) peak = token;
      if (heat[token] > top[2]) {
        top[2] = heat[token];
        top.sort((a, b) => b - a);
      }
    }
    const score = top[0] + top[1] + top[2];
    if (score > 0) ranked.push({ start, end, peak, score });
  }
  return ranked.sort((a, b) => b.score - a.score || a.start - b.start);
}

// Why a token is always attended, or null: sinks and the local window are not voted for.
function alwaysAttended(trace, token, step) {
  const last = step < 0 ? trace.numSteps - 1 : step;
  if (!trace.numLayers || last < 0) return null;
  const windows = trace.windows.subarray(last * trace.numLayers, (last + 1) * trace.numLayers);
  if (token < trace.numSinks) return "one of the first tokens";
  const query = trace.numPrompt - 1 + last;
  if (token <= query && token >= Math.max(...windows)) return "in the local window, right before the token written";
  return null;
}

// The largest value in each of `count` equal parts of the text.
function binned(values, count) {
  const bins = new Float32Array(count);
  for (let i = 0; i < values.length; i++) {
    const bin = Math.floor((i * count) / values.length);
    if (values[i] > bins[bin]) bins[bin] = values[i];
  }
  return bins;
}
