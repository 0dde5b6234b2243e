// What the page holds: facts as JSON, and arrays in one compressed block.

const ARRAY_TYPES = {
  uint8: Uint8Array, int8: Int8Array, int32: Int32Array, float32: Float32Array,
};

async function unpack(base64) {
  const signs = atob(base64);
  const bytes = new Uint8Array(signs.length);
  for (let i = 0; i < signs.length; i++) bytes[i] = signs.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// The trace: facts, arrays and, from them, the text of any tokens.
async function readTrace() {
  const trace = JSON.parse(document.getElementById("facts").textContent);
  const data = document.getElementById("data");
  const buffer = await unpack(data.textContent);
  data.remove(); // the browser need not keep it twice
  for (const { name, type, offset, length } of trace.arrays) {
    trace[name] = new ARRAY_TYPES[type](buffer, offset, length);
  }
  trace.text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(trace.text);
  trace.numLayers = trace.layers.length;
  return trace;
}

function textOf(trace, start, end) {
  const begin = (token) => (token < trace.numTokens ? trace.starts[token] : trace.text.length);
  return trace.text.slice(begin(start), begin(end));
}

// A token's text on one line, its white space visible.
function quoted(trace, token) {
  const text = textOf(trace, token, token + 1).replace(/\n/g, "↵").replace(/\t/g, "⇥");
  return `“${text}”`;
}

// The place in the text of a position of its characters.
function tokenAt(trace, character) {
  let low = 0, high = trace.numTokens - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (trace.starts[middle] <= character) low = middle; else high = middle - 1;
  }
  return low;
}

const percent = (share, digits = 1) => `${(share * 100).toFixed(digits)}%`;
const thousands = (number) => number.toLocaleString("en");
const depthOf = (trace, token) => Math.min(1, token / trace.numPrompt);
