"""Many short runs of a launch program that share their imports."""

# Runs the program once for each list of arguments, in a fork of a process that
# has made the imports already; prints [exit status, stderr] of each.
DRIVER = """
import json, os, runpy, sys, tempfile, warnings
import hiar_jax.sampling.video_pipeline
import ml_collections.config_flags
program, *runs = sys.argv[1:]
# Nothing has been computed yet, so there is no thread that a fork could miss.
warnings.filterwarnings('ignore', 'os.fork', RuntimeWarning)
results = []
for run in runs:
  with tempfile.TemporaryFile('w+') as stderr:
    pid = os.fork()
    if not pid:
      os.dup2(stderr.fileno(), 2)
      os.dup2(2, 1)
      sys.argv = [program, *json.loads(run)]
      runpy.run_path(program, run_name='__main__')
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    stderr.seek(0)
    results.append([status, stderr.read()])
print(json.dumps(results))
"""
