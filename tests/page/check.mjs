// Opens report pages in headless Chromium as a reader does, and says what is wrong with them.
//
//     node check.mjs CHROMIUM FOLDER_OF_SCREENSHOTS PAGE.html ...
//
// At 1280 and 390 px, light and dark: no console error, no request beyond the file itself, nothing
// wider than the window, every picture drawn, every control of use, and no serious fault that
// axe-core finds.
import { readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.cwd(), "check.mjs"));
const { launch } = await import(pathToFileURL(require.resolve("puppeteer-core")));
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf-8");
const [chromium, folder, ...pages] = process.argv.slice(2);
const MOST_BYTES = 3e6;
const WIDTHS = [1280, 390], THEMES = ["light", "dark"];

const faults = [];
const browser = await launch({ executablePath: chromium, args: ["--no-sandbox", "--disable-gpu"] });
for (const path of pages) {
  if (statSync(path).size > MOST_BYTES) faults.push(`${path}: more than 3 MB`);
  for (const width of WIDTHS) for (const theme of THEMES) await visit(path, width, theme);
}
await browser.close();
for (const fault of faults) console.error(fault);
console.log(`${pages.length} pages, ${faults.length} faults`);
process.exit(faults.length ? 1 : 0);

async function visit(path, width, theme) {
  const say = (words) => faults.push(`${basename(path)} at ${width} px, ${theme}: ${words}`);
  const page = await browser.newPage();
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: theme }]);
  page.on("console", (message) => { if (["error", "warn"].includes(message.type())) say(`console: ${message.text()}`); });
  page.on("pageerror", (error) => say(`error: ${error.message}`));
  const url = pathToFileURL(resolve(path)).href;
  page.on("request", (request) => { if (!request.url().startsWith(url)) say(`requests ${request.url()}`); });
  await page.goto(url, { waitUntil: "load" });
  await pictures(page, say);
  await overflow(page, say);
  await faultsOfAxe(page, say);
  await page.screenshot({ path: join(folder, `${basename(path, ".html")}-${width}-${theme}.png`), fullPage: true });
  await controls(page, say);
  await page.close();
}

async function pictures(page, say) {
  const empty = await page.$$eval("[data-picture]", (all) => all.filter((one) => !one.querySelector("svg path, svg rect, svg circle")).map((one) => one.dataset.picture));
  for (const name of empty) say(`picture ${name} is empty`);
}

async function overflow(page, say) {
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  if (wide > 0) say(`${wide} px wider than the window`);
}

async function faultsOfAxe(page, say) {
  await page.evaluate(axe);
  const found = await page.evaluate(async () => (await axe.run(document)).violations.map((each) => [each.impact, each.id, each.nodes.length, each.nodes[0].html.slice(0, 120)]));
  for (const [impact, ...words] of found) if (["serious", "critical"].includes(impact)) say(`axe: ${impact} ${words.join(" ")}`);
}

// Every button and field is used, by the keyboard where that is what a reader would do.
async function controls(page, say) {
  const svg = (name) => page.$eval(`[data-picture="${name}"]`, (one) => [one.querySelectorAll("path, rect, circle").length, one.textContent].join());
  for (const name of await page.$$eval("[data-zoom=in]", (all) => all.map((one) => one.dataset.of))) {
    const press = async (zoom) => { await page.focus(`[data-of="${name}"][data-zoom="${zoom}"]`); await page.keyboard.press("Enter"); return svg(name); };
    const whole = await press("whole"), near = await press("in"), right = await press("right");
    if (near === whole) say(`zooming into ${name} does nothing`);
    if (right === near) say(`moving ${name} does nothing`);
    await press("left"); await press("out");
    if ((await press("whole")) !== whole) say(`${name} does not come back whole`);
  }
  const order = () => page.$$eval("#layouts tbody tr", (rows) => rows.map((row) => row.textContent).join("|"));
  const before = await order();
  await page.focus("#layouts th:nth-child(2) button"); await page.keyboard.press("Enter");
  const up = await order(); await page.keyboard.press("Enter");
  if (before.includes("|") && up === (await order())) say("sorting does nothing");
  await page.type("#filter", "no layout has this");
  if (await page.$$eval("#layouts tbody tr", (rows) => rows.some((row) => !row.hidden))) say("the filter shows all");
  const colour = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const first = await colour(); await page.focus("#theme"); await page.keyboard.press("Space");
  if (first === (await colour())) say("the theme does not change");
  await faultsOfAxe(page, say);
  for (const each of await page.$$("summary")) { await each.focus(); await page.keyboard.press("Enter"); }
  await overflow(page, say);
}
