"""What runs inside vLLM: model classes whose routed experts live elsewhere, the weight loader, the OpenAI server.

Only these modules, ep/plugin.py, cluster/executor.py and cluster/scheduler.py import vLLM.
"""
