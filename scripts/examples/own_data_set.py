"""A data set of your own: photos of a shop's products, listed by a JSON file.

fastirt train --dataset scripts/examples/own_data_set.py:products --data-path photos.json

photos.json: [{"photo": "a/1.jpg", "product": "a"}, …], photos beside it. Every third product tests.
"""

import json


def products(path):
    photos = json.loads(path.read_text())
    tested = set(sorted({photo["product"] for photo in photos})[::3])
    for photo in photos:
        yield photo["photo"], photo["product"], "test" if photo["product"] in tested else "train"
