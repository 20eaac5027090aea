"use strict";
// Draws the sections of a report: tables as elements, charts with Plotly, both in the colours of light or dark.

const REPORT = pageData();
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b5468f", "#b87a00", "#3a87b5", "#5c626d"]; // Okabe-Ito, on white
const DARK = ["#56b4e9", "#ff9a4d", "#2fd0a0", "#e59ac6", "#f0e442", "#9fc7ff", "#a3abb8"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const plots = [];

function colour(group) {
  const palette = isDark() ? DARK : LIGHT;
  return palette[group % palette.length];
}

function translucent(hex) {
  return `rgba(${[1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)).join(",")},0.2)`;
}

// The traces of the data with their colours; lines differ in dash as well, so that no one needs to tell colours apart.
function coloured({ group, isBand, ...trace }) {
  const own = colour(group);
  if (isBand) return { ...trace, fillcolor: translucent(own), line: { width: 0 } };
  if (trace.stackgroup) return { ...trace, fillcolor: own, line: { width: 0.5, color: own } };
  if (trace.type !== "scatter") return { ...trace, marker: { color: own } };
  return { ...trace, line: { color: own, width: 2, dash: DASHES[group % DASHES.length] }, marker: { color: own, size: 6 } };
}

function layoutOf(chart) {
  const style = getComputedStyle(document.body);
  const line = isDark() ? "#343943" : "#dcd9d0";
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true, exponentformat: "power" };
  return {
    font: { family: style.fontFamily, size: 12, color: style.color },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 52, r: 8, t: 8, b: 36 },
    xaxis: { ...axis, title: { text: chart.x, standoff: 4 } },
    yaxis: { ...axis, title: { text: chart.y, standoff: 6 }, tickformat: chart.isShare ? ".1~%" : "", rangemode: "tozero" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    showlegend: chart.traces.filter((trace) => !trace.isBand).length > 1,
    hovermode: chart.isSteps ? "x unified" : "closest",
    hoverlabel: { bgcolor: isDark() ? "#1c1f26" : "#ffffff", font: { color: style.color } },
    barmode: "group",
    bargap: 0.3,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: style.color },
  };
}

function draw({ node, chart }) {
  const options = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  return Plotly.react(node, chart.traces.map(coloured), layoutOf(chart), options);
}

function tableOf({ head, rows }) {
  const table = element("table");
  const line = (cells, tag) => {
    const row = element("tr");
    row.append(...cells.map((cell) => element(tag, "", cell)));
    return row;
  };
  table.append(line(head, "th"), ...rows.map((row) => line(row, "td")));
  const scroll = element("div", "scroll");
  scroll.append(table);
  return scroll;
}

function cardOf(chart) {
  const card = element("div", "card");
  const title = element("h3");
  title.append(unescaped(chart.title));
  const node = element("div", "plot");
  const more = element("details");
  more.append(element("summary", "", "Figures"), tableOf(chart.table));
  card.append(title, element("span", "metric", chart.metric), node, more);
  plots.push({ node, chart });
  return card;
}

// Titles are escaped for Plotly; here they are plain text.
function unescaped(text) {
  return text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
}

function sectionOf({ title, note, charts, table }) {
  const section = element("section");
  section.append(element("h2", "", title));
  if (note) section.append(element("p", "soft", note));
  if (table.rows.length) section.append(tableOf(table));
  const grid = element("div", charts.length <= 2 ? "charts large" : "charts");
  grid.append(...charts.map(cardOf));
  section.append(grid);
  return section;
}

document.getElementById("title").textContent = REPORT.title;
document.getElementById("report").append(...REPORT.sections.map(sectionOf));
runLibrary().then(() => {
  plots.forEach(draw);
  watchTheme(document.getElementById("theme"), () => plots.forEach(draw));
});
