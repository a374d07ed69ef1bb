"""Tiny data sets in the layouts in which the named ones are published."""

import json

from source_files import fill, png


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco(root, split="val2017", count=3):
    """Pictures 1, 2, ... with two captions each."""
    names = [f"{number:012d}.jpg" for number in range(1, count + 1)]
    fill(root, *(f"{split}/{name}" for name in names))
    images = [
        {"license": 1, "file_name": name, "height": 4, "width": 4, "id": number}
        for number, name in enumerate(names, 1)
    ]
    annotations = [
        {"image_id": image["id"], "id": 10 * image["id"] + again, "caption": f"{word} {image['id']}\n"}
        for again, word in enumerate(("A picture", "Number"))
        for image in images
    ]
    content = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
    return dump(root / "annotations" / f"captions_{split}.json", content)


def karpathy(root, name, rows):
    """Rows of (split, folder, file name, number, captions)."""
    images = [
        {
            **({"filepath": folder, "cocoid": number} if folder else {}),
            "filename": file,
            "imgid": place,
            "split": split,
            "sentids": [],
            "sentences": [{"tokens": c.split(), "raw": c, "imgid": place, "sentid": 0} for c in captions],
        }
        for place, (split, folder, file, number, captions) in enumerate(rows)
    ]
    return dump(root / f"dataset_{name}.json", {"images": images, "dataset": name})


def coco_karpathy(root):
    rows = []
    for number, (split, folder) in enumerate(
        [("train", "train2014"), ("restval", "val2014"), ("val", "val2014"), ("test", "val2014")], 1
    ):
        name = f"COCO_{folder}_{number:012d}.jpg"
        fill(root, f"{folder}/{name}")
        rows.append((split, folder, name, number, [f"caption {number}", f"number {number}"]))
    return karpathy(root, "coco", rows)


def flickr30k(root, *, tokens=False):
    names = ["1000092795.jpg", "10002456.jpg", "1000268201.jpg"]
    fill(root, *(f"flickr30k-images/{name}" for name in names))
    if tokens:
        found = [f"{name}#{n}\tCaption {n} of {name} ." for name in names for n in range(2)]
        (root / "results_20130124.token").write_text("\n".join(found) + "\n")
        return root / "results_20130124.token"
    rows = [
        (split, "", name, 0, [f"First {name}", f"Second {name}"])
        for name, split in zip(names, ("train", "val", "test"), strict=True)
    ]
    return karpathy(root, "flickr30k", rows)


def vqav2(root, split="train", part="train2014", pictures="train2014"):
    """Two questions about picture 9, one about picture 25."""
    asked = [(9000, 9, "What is it?"), (9001, 9, "Is it red?"), (25000, 25, "How many?")]
    fill(root, *(f"{pictures}/COCO_{pictures}_{number:012d}.jpg" for number in (9, 25)))
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": part}
    questions = [{"image_id": image, "question": text, "question_id": id} for id, image, text in asked]
    dump(root / f"v2_OpenEnded_mscoco_{part}_questions.json", head | {"questions": questions})
    if split.startswith("test"):
        return
    annotations = [
        {
            "question_type": "what",
            "multiple_choice_answer": "yes",
            "answers": [
                {"answer": f"a{n}", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)
            ],
            "image_id": image,
            "answer_type": "other",
            "question_id": id,
        }
        for id, image, _ in reversed(asked)
    ]
    dump(root / f"v2_mscoco_{part}_annotations.json", head | {"annotations": annotations})


def nlvr2(root, *, flat=False):
    train = [("train-10171-0-0", "True", 0), ("train-10171-0-1", "False", 0), ("train-7-2-0", "True", 4)]
    (root / "data").mkdir(parents=True)
    rows = [
        {"identifier": name, "label": label, "sentence": f"About {name}.", "directory": folder, "synset": "x"}
        for name, label, folder in train
    ]
    (root / "data" / "train.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    dev = {"identifier": "dev-850-0-1", "label": "False", "sentence": "Two dogs.", "query": "dogs0"}
    (root / "data" / "dev.json").write_text(json.dumps(dev))
    for n in (0, 1):
        for stem, folder in (("train-10171-0", 0), ("train-7-2", 4)):
            fill(root, f"images/{stem}-img{n}.png" if flat else f"images/train/{folder}/{stem}-img{n}.png")
        fill(root, f"images/dev-850-0-img{n}.png" if flat else f"dev/dev-850-0-img{n}.png")


WNIDS = ("n01440764", "n02012849", "n03126707")


def imagenet(root, *, flat=False):
    fill(root, *(f"train/{wnid}/{wnid}_{n}.JPEG" for wnid in WNIDS for n in (1, 2)))
    for number, wnid in enumerate(WNIDS, 1):
        fill(root, f"val/{'' if flat else wnid + '/'}ILSVRC2012_val_{number:08d}.JPEG")


def ade20k(root):
    inner = root / "ADEChallengeData2016"
    scenes = []
    for split, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for number in range(1, count + 1):
            name = f"ADE_{short}_{number:08d}"
            fill(inner, f"images/{split}/{name}.jpg")
            path = inner / "annotations" / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png((number, number, number)))
            scenes.append(f"{name} scene_{number}\n")
    (inner / "sceneCategories.txt").write_text("".join(scenes))
    return inner
