#!/usr/bin/env bash
# The two LeNets of Deep Compression on handwritten digits, three seeds: accuracy and bytes after each stage, as a
# Markdown table of means and standard deviations over the seeds. A few minutes on one core.
#   scripts/deep_compression.sh [overrides]
set -euo pipefail
prune run -m recipe=lenet_digits_deep_compression,lenet5_digits_deep_compression seed=0,1,2 latency=false "$@"
python - "$(ls -d outputs/multirun/*/ | tail -n 1)results.csv" <<'PYTHON'
import sys

import pandas

table = pandas.read_csv(sys.argv[1])
print("| network | acc1 dense | pruned | shared | KB dense | pruned | shared | Huffman (entropy) | times smaller |")
print("|---|---|---|---|---|---|---|---|---|")
for name, rows in table.groupby("model"):
    stages = {stage: found for stage, found in rows.groupby("stage")}
    accuracy = [f"{stages[s].acc1.mean():.2f} ± {stages[s].acc1.std():.2f}" for s in ("train", "prune", "share")]
    share = stages["share"].mean(numeric_only=True)
    size = [f"{share[c] / 1e3:.1f}" for c in ("bytes", "bytes_pruned", "bytes_shared", "bytes_huffman")]
    size[-1] += f" ({share.bytes_entropy / 1e3:.1f})"
    print("|", " | ".join([name, *accuracy, *size, f"{share.compression_bytes:.1f}"]), "|")
PYTHON
