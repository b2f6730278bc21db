"use strict";
(() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axes = (layout) => Object.keys(layout).filter((key) => /^[xy]axis/.test(key));
  const axis = () => ({ gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true });
  const font = () => ({ color: css("--text"), family: "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", size: 13 });
  // The bar's own list: plotly.js would add a button that sends the plot to a server.
  const config = {
    responsive: true,
    displaylogo: false,
    plotlyServerURL: "",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };
  const drawn = [];

  for (const block of document.querySelectorAll("[data-figure]")) {
    const figure = JSON.parse(document.getElementById("figure-" + block.dataset.figure).textContent);
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--text") },
      margin: { l: 60, r: 20, t: 30, b: 50 },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
      ...figure.layout,
      font: font(),
    };
    for (const name of axes(layout)) layout[name] = { ...axis(), ...layout[name] };
    Plotly.newPlot(block, figure.data, layout, config);
    drawn.push([block, layout]);
    const menu = document.querySelector(`[data-menu="${block.dataset.figure}"]`);
    if (menu) {
      menu.addEventListener("change", () => {
        const choice = figure.choices[menu.selectedIndex];
        Plotly.restyle(block, choice.update, choice.traces);
      });
    }
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [block, layout] of drawn) {
      const update = { font: font(), "modebar.color": css("--faint"), "modebar.activecolor": css("--text") };
      for (const name of axes(layout)) {
        for (const [key, value] of Object.entries(axis())) update[`${name}.${key}`] = value;
      }
      Plotly.relayout(block, update);
    }
  });
})();
