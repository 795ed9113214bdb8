for (const figure of document.querySelectorAll("[data-chart]")) {
  const {x, area, series} = JSON.parse(figure.dataset.chart), svg = figure.querySelector("svg"), cross = svg.querySelector(".cross");
  svg.addEventListener("mousemove", event => {
    const scale = svg.viewBox.baseVal.width / svg.getBoundingClientRect().width, px = event.offsetX * scale;
    if (px < area[0] || px > area[1]) return;
    const at = x[0] + (px - area[0]) / (area[1] - area[0]) * (x[1] - x[0]);
    cross.setAttribute("x1", px); cross.setAttribute("x2", px);
    for (const label of figure.querySelectorAll("[data-series]")) {
      const near = series[label.dataset.series].reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      label.textContent = Math.abs(near[1]) < .01 ? near[1].toExponential(2) : Number(near[1].toPrecision(4));
    }
    figure.querySelector(".where").textContent = "step " + Math.round(at);
  });
}
