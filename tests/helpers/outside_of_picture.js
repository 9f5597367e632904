() => {
  const svg = document.querySelector("svg"), box = svg.viewBox.baseVal, found = [];
  for (const text of svg.querySelectorAll("text")) {
    const own = text.getBBox(), matrix = text.getCTM().inverse ? svg.getCTM().inverse().multiply(text.getCTM()) : null;
    const at = (x, y) => { const p = svg.createSVGPoint(); p.x = x; p.y = y; return matrix ? p.matrixTransform(matrix) : p; };
    const a = at(own.x, own.y), b = at(own.x + own.width, own.y + own.height);
    if (a.x < box.x - 1 || b.x > box.x + box.width + 1 || b.y > box.y + box.height + 1) found.push(`${text.textContent} reaches ${Math.round(b.x)} of ${box.width}`);
  }
  return found;
}
