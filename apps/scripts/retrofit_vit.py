"""Put windows of several sizes into a ViT: what is computed, how long it takes, how far the features move.

python -m vision_attn.apps.scripts.retrofit_vit --model vit_base_patch16_224 --pretrained --size 448
"""

import argparse

import timm
import torch
from torch.nn.functional import cosine_similarity

from vision_attn import Neighborhood, attach


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a timm ViT")
    parser.add_argument("--pretrained", action="store_true", help="with its weights, which timm downloads")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images in pixels")
    parser.add_argument("--windows", type=int, nargs="+", default=[3, 7, 11], help="sides, in tokens")
    parser.add_argument("--dense-layers", type=int, default=1, help="first layers that stay as they are")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing")
    chosen = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(chosen.model, pretrained=chosen.pretrained, img_size=chosen.size).eval().to(device)
    images = torch.randn(chosen.batch, 3, chosen.size, chosen.size, device=device)
    print("window  density  GFLOPs dense  GFLOPs sparse  ms dense  ms sparse  cosine of the features")
    with torch.no_grad():
        dense = model.forward_features(images)
        for window in chosen.windows:
            with attach(model, Neighborhood(window), dense_layers=chosen.dense_layers) as run:
                sparse = model.forward_features(images)
                report = run.measure(images, repeats=chosen.repeats).to_dict()
            flops, seconds = report["flops"], report["seconds"]
            shares = [share for tower in report["towers"] for share in tower["density"]]
            density = sum(shares) / len(shares)
            print(
                f"{window:6d}  {density:7.1%}  {flops['before'] / 1e9:12.2f}  {flops['after'] / 1e9:13.2f}  "
                f"{seconds['before'] * 1e3:8.1f}  {seconds['after'] * 1e3:9.1f}  "
                f"{cosine_similarity(dense, sparse, dim=-1).mean():.3f}"
            )


if __name__ == "__main__":
    main()
