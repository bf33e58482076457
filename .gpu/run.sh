python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .site .whl/*.whl && export PYTHONPATH=.site:. PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 || exit
T0=$(date +%s); left() { echo "[$(( $(date +%s) - T0 )) s] $*"; }
nvidia-smi | sed -n 3,12p; python3 -c "import torch, transformers; print(torch.__version__, transformers.__version__)"
b() { name=$1; shift; left "## $name"; timeout $1 python3 -m benchmarks.$name --device cuda >$OUT/$name.log 2>&1; echo rc $?; tail -${2:-25} $OUT/$name.log | cut -c1-400; }
b p2_training 110 45
left "## prof"; timeout 70 python3 .gpu/prof.py >$OUT/prof.log 2>&1; echo rc $?; cut -c1-150 $OUT/prof.log | grep -v "^---" | tail -42
b p1_captioning 110
b p3_attention 50
b p2_inference 70
left "## e2e + tests"
timeout 110 python3 -m pytest -x tests/test_cuda.py -p no:cacheprovider >$OUT/pytest.log 2>&1 &
timeout 125 python3 .gpu/e2e.py >$OUT/e2e.log 2>&1; echo rc $?; grep -v Loading $OUT/e2e.log | cut -c1-300 | tail -60
wait; tail -40 $OUT/pytest.log | cut -c1-300; left end
