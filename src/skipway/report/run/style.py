"""The report's own rules of style, beside those that all pages share."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
.result { font-size: 1.05rem; margin: .8rem 0; }
.result strong { font-size: 2.4rem; line-height: 1.1; margin-right: .3rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1rem 0 0; font-size: .9rem; }
section { border-top: 1px solid var(--line); margin-top: 1.6rem; } section h2 { margin: .9rem 0 .6rem; }
section h3 { margin: 1.2rem 0 .3rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; } .chart.whole { max-width: 36rem; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .85rem; margin-bottom: .2rem; }
.key { color: var(--soft); } .key::before { content: ""; display: inline-block; width: 1rem; height: .55rem;
  margin-right: .35rem; border-radius: 2px; background: var(--kind); }
.a { --kind: var(--stream); } .b { --kind: var(--branch); } .c { --kind: var(--distinct); }
.faint { --kind: var(--faint); }
:root { --faint: #b9bfc5; } @media (prefers-color-scheme: dark) { :root { --faint: #565d63; } }
svg .line { fill: none; stroke: var(--kind); stroke-width: 2; stroke-linejoin: round; }
svg .line.faint { stroke-width: 1.2; } svg .dot { fill: var(--kind); } svg .dot.unseen { fill: transparent; }
svg .dot.edge { fill: var(--paper); stroke: var(--kind); stroke-width: 1.5; } svg .bar { fill: var(--kind); }
svg .mark { stroke: var(--soft); stroke-dasharray: 3 3; } svg text.small, svg .small { font-size: 10px; }
svg .cell.hit { fill: var(--stream); } svg .cell.miss { fill: var(--branch); }
svg text.in { fill: var(--ink); } svg text.on { fill: var(--paper); } svg text.on tspan { fill: var(--paper); }
.tall { max-height: 32rem; overflow: auto; } .tall thead th { position: sticky; top: 0; background: var(--paper); }
.plain td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.plain td:first-child { color: var(--soft); white-space: nowrap; width: 1%; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .8rem; }
.pictures img { width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; display: block; border-radius: .25rem;
  background: var(--card); } .pictures img.small { image-rendering: pixelated; }
.pictures figcaption { font-size: .75rem; line-height: 1.35; margin-top: .2rem; overflow-wrap: anywhere; }
.pictures figcaption span, .pictures figcaption b { display: block; }
.file { color: var(--soft); word-break: break-all; }
.names td:not(.number) { white-space: normal; overflow-wrap: anywhere; min-width: 5.5rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .3rem; padding: .6rem .8rem;
  margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 32rem) { th, td { padding: .25rem .35rem; } }
"""
