"""How a page looks: by day, by night, and on paper."""

__all__ = ["STYLE"]

_LIGHT = """
  --ink: #1f2933; --muted: #5f6b76; --grid: #dddddd; --paper: #ffffff; --shade: #f3f5f7; --warn: #fff4e0; --edge: #e2a33b;
  --pale: #9bb8d3; --strong: #1f4e79; --limit: #c0392b; --switch: #2e7d32;
  --series-0: #1f6fb4; --series-1: #d9730d; --series-2: #2a8c5a; --series-3: #b5403a;
  --series-4: #7d5ba6; --series-5: #8c6d46; --series-6: #c2528b; --series-7: #3c8f9b;
"""
_DARK = """
  --ink: #e4e8ec; --muted: #9aa6b2; --grid: #39434d; --paper: #15191d; --shade: #1f252b; --warn: #372c16; --edge: #b98a35;
  --pale: #4d6d8c; --strong: #8fc1ef; --limit: #f0776a; --switch: #74c27a;
  --series-0: #6cb2ee; --series-1: #f5a65b; --series-2: #68c79a; --series-3: #ec8a83;
  --series-4: #b99be0; --series-5: #c9ab82; --series-6: #ea92bd; --series-7: #7cc9d4;
"""
STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
@media print {{ :root {{ color-scheme: light; {_LIGHT} }} }}
body {{ margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 69rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--grid); }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }}
p, figcaption, li {{ max-width: 48rem; overflow-wrap: anywhere; }}
.muted, figcaption {{ color: var(--muted); font-size: .87rem; }}
nav {{ margin: .75rem 0 0; }} nav a {{ margin-right: 1rem; }} a {{ color: var(--series-0); }}
.scroll {{ overflow-x: auto; margin: .75rem 0; }}
table {{ border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .75rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid);
  max-width: 26rem; overflow-wrap: break-word; }}
th {{ color: var(--muted); font-weight: 600; white-space: nowrap; }} td.number {{ text-align: right; }}
th.number {{ text-align: right; }}
.whole {{ white-space: nowrap; }} .wide {{ min-width: 11rem; overflow-wrap: anywhere; }}
figure {{ margin: .75rem 0 1rem; }} figure svg {{ display: block; width: 100%; height: auto; }}
svg * {{ stroke-linejoin: round; stroke-linecap: butt; }} svg text {{ fill: var(--ink); }}
svg image {{ image-rendering: pixelated; }}
.columns {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 0 1.5rem; }}
.swatch {{ display: inline-block; width: .7em; height: .7em; margin-right: .45em; border-radius: 2px; }}
.problems {{ background: var(--warn); border-left: 4px solid var(--edge); padding: .5rem 1rem; margin: 1rem 0; }}
.problems ul {{ margin: .25rem 0; padding-left: 1.2rem; }}
pre {{ background: var(--shade); padding: .75rem 1rem; overflow-x: auto; font-size: .8rem; white-space: pre-wrap; }}
@media print {{ body {{ max-width: none; font-size: 11px; padding: 0; }} nav {{ display: none; }}
  figure, tr {{ break-inside: avoid; }} h2, h3 {{ break-after: avoid; }} .scroll {{ overflow: visible; }} }}
"""
