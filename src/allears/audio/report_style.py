"""The look of the report page, and the few lines of script that keep its players in step."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #1c1d21; --faint: #62656e; --line: #dcdde1;
  --accent: #b8431f; --wave: #3f5c8c; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1d1f24; --ink: #ecedf0; --faint: #9a9eaa;
  --line: #33363e; --accent: #ff9a6b; --wave: #8fb0e6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 0; }
.facts { display: flex; flex-wrap: wrap; gap: .35rem 1.5rem; margin: .3rem 0 0; }
.facts div { display: flex; gap: .4rem; min-width: 0; }
.facts dt { color: var(--faint); white-space: nowrap; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 1rem;
  margin-top: 1.25rem; }
.tracks { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  column-gap: 1.25rem; row-gap: 0; margin-top: 1rem; }
.track { display: grid; grid-row: span 5; grid-template-rows: subgrid; min-width: 0; margin-bottom: .75rem; }
audio { display: block; width: 100%; height: 2.5rem; margin: .5rem 0; }
.note { color: var(--faint); font-size: .85rem; margin: .25rem 0; }
.plot { display: grid; grid-template-columns: 3rem minmax(0, 1fr); font-size: .72rem; color: var(--faint);
  font-variant-numeric: tabular-nums; }
.plot + .plot { margin-top: .5rem; }
.y, .x { position: relative; }
.y span { position: absolute; right: .4rem; white-space: nowrap; transform: translateY(50%); }
.y span.top { transform: translateY(85%); }
.y span.bottom { transform: translateY(15%); }
.x { grid-column: 2; height: 1.3rem; margin-top: .15rem; }
.x span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.x span.first { transform: none; }
.x span.last { transform: translateX(-100%); }
.field { position: relative; height: 12rem; border-radius: .25rem; overflow: hidden; background: #000; }
.field img, .field svg { position: absolute; inset: 0; width: 100%; height: 100%; display: block; }
.wave .field { height: 4.5rem; background: var(--page); color: var(--wave); }
.strips { display: grid; grid-template-columns: max-content minmax(0, 1fr); column-gap: .6rem; row-gap: .25rem;
  align-items: center; margin-top: .75rem; font-size: .72rem; color: var(--faint); }
.strips svg { width: 100%; height: .9rem; display: block; border-radius: .2rem; background: var(--page);
  fill: var(--wave); }
.stacked { display: grid; gap: 1rem; margin-top: 1rem; }
.stacked .track { display: block; margin: 0; }
.stacked .plot { grid-template-columns: 4rem minmax(0, 1fr); }
.stacked .field { height: 9rem; }
.stacked .wave .field { height: 3.5rem; }
.stacked .curves .field { height: 7.5rem; background: var(--page); }
.stacked .rows .field { height: 3rem; background: var(--page); }
.stacked .field { cursor: crosshair; }
.stacked.played .field::after { content: ""; position: absolute; inset: 0 auto 0 calc(100% * var(--at, 0));
  border-left: 1px solid var(--accent); }
.panel { min-width: 0; }
.panel h3 { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; margin-bottom: .25rem; }
.panel path { fill: none; stroke: var(--accent); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.panel path.faint { stroke: var(--faint); stroke-width: 1; opacity: .7; }
.panel .dark path { stroke: #fff; stroke-width: 1.25; }
.panel .dark .field { background: #000; }
.panel rect { fill: var(--wave); }
.legend { font-weight: 400; font-size: .72rem; color: var(--faint); }
.legend i { display: inline-block; width: 1.2rem; height: 0; border-top: 2px solid var(--accent); margin: 0 .35rem .2rem
  .8rem; }
.legend i.faint { border-color: var(--faint); }
h2.part { margin-top: 1.25rem; font-size: 1rem; }
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin-top: .75rem; font-size: .72rem;
  color: var(--faint); }
.scale i { display: block; flex: 0 0 9rem; height: .6rem; border-radius: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-top: .75rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1.25rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; }
.change { color: var(--accent); font-weight: 600; }
footer { margin-top: 2rem; color: var(--faint); font-size: .85rem; }
"""

SCRIPT = """
document.querySelectorAll("article").forEach(function (article) {
  var players = Array.from(article.querySelectorAll("audio"));
  players.forEach(function (player) {
    player.addEventListener("play", function () {
      players.forEach(function (other) {
        if (other !== player && !other.paused) { player.currentTime = other.currentTime; other.pause(); }
      });
    });
    player.addEventListener("timeupdate", function () {
      var stacked = player.closest(".stacked");
      if (!stacked || !player.duration) { return; }
      stacked.classList.add("played");
      stacked.style.setProperty("--at", player.currentTime / player.duration);
    });
  });
  article.querySelectorAll(".stacked .field").forEach(function (field) {
    field.addEventListener("click", function (event) {
      var own = Array.from(field.closest(".stacked").querySelectorAll("audio"));
      var player = own.find(function (other) { return !other.paused; }) || own[0];
      var box = field.getBoundingClientRect();
      if (player && player.duration) { player.currentTime = player.duration * (event.clientX - box.left) / box.width; }
    });
  });
});
"""
