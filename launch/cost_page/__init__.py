"""docs/cost.md, written from the cost model; `page` is the way in."""
