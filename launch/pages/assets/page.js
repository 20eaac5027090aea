"use strict";
// What both pages share: their data, a library that comes compressed, elements made without markup, and the choice between light and dark.

function pageData() {
  return JSON.parse(document.getElementById("data").textContent);
}

// Run the library that the page carries compressed; the page's policy allows that very text, by its hash.
async function runLibrary() {
  const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (sign) => sign.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(element("script", "", await new Response(unpacked).text()));
}

// An element with text. Text of a run goes through textContent alone: it is never read as markup.
function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== "") node.textContent = text;
  return node;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// Wire the button that turns light into dark, and tell when either the button or the system has changed it.
function watchTheme(button, onChange) {
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    name();
    onChange();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { name(); onChange(); });
  name();
}
