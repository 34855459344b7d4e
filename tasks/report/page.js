// Draw every plot in the colours of the page, and again when the reader's colour scheme changes.
"use strict";

// A colour in a figure may be "var(--name)": look it up, but only under keys that hold colours.
function resolve(value, css, isColor) {
  if (typeof value === "string") {
    const found = isColor && value.match(/^var\((--[\w-]+)\)$/);
    return found ? css.getPropertyValue(found[1]).trim() : value;
  }
  if (Array.isArray(value)) return value.map((item) => resolve(item, css, isColor));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, item]) => [key, resolve(item, css, key.includes("color"))]),
  );
}

function draw() {
  const css = getComputedStyle(document.documentElement);
  const family = getComputedStyle(document.body).fontFamily;
  for (const plot of document.querySelectorAll(".plot")) {
    const figure = resolve(JSON.parse(document.getElementById(`${plot.id}-data`).textContent), css, false);
    figure.layout.font.family = family;
    Plotly.react(plot, figure.data, figure.layout, { displayModeBar: false, responsive: true });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
