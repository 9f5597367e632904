() => {
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width + 1) found.push(`the page scrolls sideways: ${document.documentElement.scrollWidth} > ${width}`);
  const scrolls = (e) => { for (; e && e !== document.body; e = e.parentElement) {
    const x = getComputedStyle(e).overflowX; if (x === "auto" || x === "scroll" || (x === "hidden" && e.matches(".headerlink, .md-clipboard"))) return true; } return false; };
  for (const e of document.querySelectorAll("article *, main *")) {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!box.width || !box.height || style.visibility === "hidden" || style.display === "none" || style.position === "fixed") continue;
    if (box.right > width + 1 && !scrolls(e)) found.push(`${e.tagName}.${e.className} ends at ${Math.round(box.right)} of ${width}: ${(e.textContent || "").trim().slice(0, 60)}`);
    if (e.tagName === "IMG" && e.complete && !e.naturalWidth) found.push(`no picture: ${e.getAttribute("src")}`);
  }
  return found.slice(0, 5);
}
