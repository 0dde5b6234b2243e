// Viridis: read alike by all eyes, also in print. What is hot stands out from the page, light or dark.

const VIRIDIS = [
  [68, 1, 84], [72, 36, 117], [65, 68, 135], [53, 95, 141], [42, 120, 142], [33, 145, 140],
  [34, 168, 132], [68, 191, 112], [122, 209, 81], [189, 223, 38], [253, 231, 37],
];
const DARK = matchMedia("(prefers-color-scheme: dark)");

function viridis(t) {
  const at = Math.min(Math.max(t, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[low].map((part, i) => Math.round(part + (VIRIDIS[low + 1][i] - part) * (at - low)));
}

// From 0 to 1: most votes are small, so the scale is that of the square root.
const intensity = (vote, top) => (vote > 0 && top > 0 ? Math.sqrt(Math.min(1, vote / top)) : 0);

function heatColour(t) {
  const [r, g, b] = viridis(DARK.matches ? t : 1 - t);
  return `rgba(${r}, ${g}, ${b}, ${Math.min(1, 0.12 + 1.1 * t)})`;
}

// Of text on that colour, which covers the page only in part where it is faint.
function inkOn(t) {
  if (t < 0.45) return "";
  return DARK.matches ? (t > 0.6 ? "#111" : "") : (t > 0.55 ? "#fff" : "");
}

const cssColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A canvas as sharp as the screen; returns its context in CSS pixels.
function prepareCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

function drawLegend(canvas, ticks, top) {
  const width = canvas.clientWidth || 200;
  const context = prepareCanvas(canvas, width, 10);
  for (let x = 0; x < width; x++) {
    context.fillStyle = heatColour(x / width);
    context.fillRect(x, 0, 1.5, 10);
  }
  ticks.replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map((t) => {
    const tick = document.createElement("span");
    tick.textContent = percent(t * t * top, top < 0.05 ? 2 : top < 0.5 ? 1 : 0);
    return tick;
  }));
}
