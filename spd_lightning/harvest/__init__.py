"""`trainer.predict` to rows: each harvester is a Lightning callback, and several share one pass
over the prompts.
"""
