// Draws icons of an iconify package as square PNGs with transparent ground:
//   node raster.cjs <package folder> <output folder> <pixels> <icon name>...
// @resvg/resvg-js must be installed in a folder that NODE_PATH names.
const fs = require("fs");
const path = require("path");
const { Resvg } = require("@resvg/resvg-js");

const INK = "#111"; // what `currentColor` means in the one-colour sets

function svg(set, name) {
  const icon = set.icons[name] || set.icons[((set.aliases || {})[name] || {}).parent];
  if (!icon) throw new Error(`no icon '${name}' in the set '${set.prefix}'`);
  const width = icon.width || set.width || 16;
  const height = icon.height || set.height || 16;
  const box = `${icon.left || 0} ${icon.top || 0} ${width} ${height}`;
  const space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"';
  return `<svg ${space} viewBox="${box}" width="${width}" height="${height}" color="${INK}">${icon.body}</svg>`;
}

const [folder, output, pixels, ...names] = process.argv.slice(2);
const set = JSON.parse(fs.readFileSync(path.join(folder, "icons.json"), "utf8"));
fs.mkdirSync(output, { recursive: true });
for (const name of names) {
  const image = new Resvg(svg(set, name), { fitTo: { mode: "width", value: Number(pixels) } }).render();
  fs.writeFileSync(path.join(output, `${name}.png`), image.asPng());
}
