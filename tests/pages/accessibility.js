// Names of controls, one main landmark, headings in order, unique ids, sizes of targets, and the
// contrast of all visible text against its nearest opaque background (WCAG 2.2: 4.5, or 3 for large
// text). Returns what is wrong.
() => {
  const found = [];
  const isSeen = (element) => element.checkVisibility({visibilityProperty: true, opacityProperty: true}) && !element.closest(".hidden-text, [aria-hidden=true]");
  const nameOf = (element) => (element.getAttribute("aria-label") || [...(element.labels || [])].map((label) => label.textContent).join(" ")
    || element.getAttribute("title") || element.textContent || element.querySelector("img")?.alt || "").trim();
  for (const element of document.querySelectorAll("button, select, input, textarea, a[href], summary, [role=application], [role=region], [role=group]")) {
    if (!isSeen(element)) continue;
    if (!nameOf(element)) found.push(`no name: ${element.outerHTML.slice(0, 80)}`);
    const box = element.getBoundingClientRect();
    if (element.matches("button, select") && (box.width < 24 || box.height < 24)) found.push(`smaller than 24 px: ${nameOf(element)}`);
  }
  if (document.querySelectorAll("main").length !== 1) found.push("not one main landmark");
  if (document.querySelectorAll("h1").length !== 1) found.push("not one h1");
  if (!document.documentElement.lang || !document.title) found.push("no language or title");
  for (const image of document.querySelectorAll("img")) if (!image.hidden && !image.alt) found.push("an image without text");
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  if (new Set(ids).size < ids.length) found.push("an id twice");
  let level = 1;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) found.push(`heading jumps: ${heading.textContent}`);
    level = next;
  }
  const parts = (colour) => { const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
  const luminance = ([r, g, b]) => [r, g, b].map((part) => part / 255).map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, n) => sum + part * [0.2126, 0.7152, 0.0722][n], 0);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || seen.has(element) || !isSeen(element) || element.closest(":disabled, option, svg, script, style")) continue;
    seen.add(element);
    const style = getComputedStyle(element);
    let ground = element;
    while (ground && parts(getComputedStyle(ground).backgroundColor)[3] < 1) ground = ground.parentElement;
    const back = ground ? parts(getComputedStyle(ground).backgroundColor) : [255, 255, 255];
    const [dark, light] = [luminance(parts(style.color)), luminance(back)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < (isLarge ? 3 : 4.5)) found.push(`contrast ${contrast.toFixed(2)}: ${node.textContent.trim().slice(0, 40)}`);
  }
  return found;
}
