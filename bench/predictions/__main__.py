"""Writes bench/predictions.jsonl, and the tables of the kernels' pages."""

import json

from bench import predictions
from bench.predictions import cuda, tables, triton
from tests.cuda_host.build import build_module
from tests.cuda_host.host import Host

rows = [*cuda.rows(Host(build_module())), *triton.rows()]
predictions.FILE.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
predictions._all.cache_clear()
for page in tables.PAGES:
    page.write_text(tables.refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")
print(predictions.FILE, *tables.PAGES)
