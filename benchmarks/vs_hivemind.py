"""One DMoE step (forward and backward) over four server processes, ours and hivemind's, in turns on this machine.

    python benchmarks/vs_hivemind.py            # needs lah_nb; makes hivemind an environment of its own in benchmarks/.venvs
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
VENV = HERE / '.venvs' / 'hivemind-1.1.12'
REQUIREMENTS = 'hivemind==1.1.12', 'numpy<2.4', 'torch==2.13.0'
STEPS = {'1': 40, '8': 15, '32': 10}
ONE_THREAD = {name: '1' for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')}


def hivemind_python() -> str:
    "The interpreter of an environment that holds hivemind, made on first use"
    if not (VENV / 'complete').exists():
        print(f'installing {", ".join(REQUIREMENTS)} into {VENV}', file=sys.stderr)
        subprocess.run([sys.executable, '-m', 'venv', '--clear', VENV], check=True)
        subprocess.run([VENV / 'bin' / 'pip', 'install', '-q', '--disable-pip-version-check', *REQUIREMENTS], check=True)
        (VENV / 'complete').touch()
    return str(VENV / 'bin' / 'python')


def measure(python: str, script: str, job: dict, timeout: float) -> tuple[dict[str, list[float]], float]:
    "Seconds of each step by batch size, and of the whole; whatever `script` started is ended with it"
    start = time.monotonic()
    side = subprocess.Popen([python, HERE / script, json.dumps(job)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD, start_new_session=True)
    try: out, err = side.communicate(timeout=timeout)
    finally:
        try: os.killpg(side.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        side.wait()
    if side.returncode: sys.exit(f'{script} failed:\n{err[-3000:]}')
    return json.loads(out.splitlines()[-1]), time.monotonic() - start


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--rounds', type=int, default=3, help='how often each side starts its servers and is measured, in turns')
    parse.add_argument('--block', choices=['paper', 'ffn'], default='paper', help="what hivemind hosts: the paper's block as ours, or its own smaller ffn")
    parse.add_argument('--handlers', type=int, default=4, help='connection handlers of each hivemind server')
    parse.add_argument('--timeout', type=float, default=300, help='seconds for one side in one round, start-up included')
    parse.add_argument('--json', metavar='FILE', help='write every step here')
    args = parse.parse_args()

    job = dict(peers=4, grid=[16, 16], hidden_dim=64, k=4, lr=0.01, batches=STEPS)
    sides = {'lah_nb': (sys.executable, 'lah_side.py', job), 'hivemind': (hivemind_python(), 'hivemind_side.py', job | dict(block=args.block, handlers=args.handlers))}
    times = {side: {batch: [] for batch in STEPS} for side in sides}
    for i in range(args.rounds):
        for side, (python, script, its_job) in sides.items():
            found, seconds = measure(python, script, its_job, args.timeout)
            for batch in STEPS: times[side][batch] += found[batch]
            print(f'round {i + 1}: {side} took {seconds:.0f} s, start-up included', file=sys.stderr)

    rates = {side: {batch: int(batch) / statistics.median(seconds) for batch, seconds in found.items()} for side, found in times.items()}
    print(f'{"batch":>6} {"lah_nb":>12} {"hivemind":>12} {"ratio":>7}   samples/s, medians')
    for batch in STEPS: print(f'{batch:>6} {rates["lah_nb"][batch]:12.1f} {rates["hivemind"][batch]:12.1f} {rates["lah_nb"][batch] / rates["hivemind"][batch]:7.1f}')
    if args.json: Path(args.json).write_text(json.dumps(dict(job=job, block=args.block, rounds=args.rounds, samples_per_s=rates, seconds=times), indent=1))


if __name__ == '__main__': main()
