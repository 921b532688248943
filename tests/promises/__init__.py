"""What DESIGN section 5 promises, asked of every model in the table of ``models.py``.

A new model is a row there and nothing else here. What only one model has is tested in ``tests/trainer/test_MODEL.py``; what is
the loop's, whatever the model (rewards that fail, a full disk), in the other files of that folder.
"""
