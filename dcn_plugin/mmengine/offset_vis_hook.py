"""'DeformOffsetVisHook' in MMEngine's HOOKS: pictures of what the deformable layers of a model in training do."""

from collections.abc import Sequence

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


class DeformOffsetVisHook(Hook):
    """Draws sampling points, offset fields and the bins of RoIs into the visualizer's backends.

    Every ``interval`` iterations the model, in evaluation mode, predicts a few images of the validation set, a second
    or two each. The backends get ``<image>_points``, ``<image>_offsets_<layer>`` and, of models that pool RoIs
    deformably, ``<image>_rois``, of those with deformable attention ``<image>_attention``, as ``python -m dcn_plugin
    visualize`` draws them. Positions are the centres of detections, or the image's. matplotlib is imported when the
    first picture is drawn.

    Args:
        interval: iterations.
        images: of the validation set by their index, or files, which go through its pipeline.
        layers: glob or several on the names of the layers to draw; by default the last convolution of each stride, and
            the last attention of an encoder and of a decoder.
        last: compose the points over so many layers.
        score_thr: detections below it are left out.

    Raises:
        ValueError: an interval that is not positive; when training starts, no validation set; when the first picture
            is drawn, a glob that matches nothing.
    """

    def __init__(
        self,
        interval: int = 1000,
        images: Sequence[int | str] = (0,),
        layers: str | Sequence[str] = (),
        last: int = 3,
        score_thr: float = 0.3,
    ):
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.interval = interval
        self.images = list(images)
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        self.last = last
        self.score_thr = score_thr
        self._warned = False

    def before_train(self, runner) -> None:
        if runner.val_loop is None:
            raise ValueError("DeformOffsetVisHook draws images of the validation set: the config needs val_dataloader")

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self.every_n_train_iters(runner, self.interval):
            self._draw(runner)

    @master_only
    def _draw(self, runner) -> None:
        from dcn_plugin.visualize import drawing
        from dcn_plugin.visualize.scene import see

        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        dataset = runner.val_loop.dataloader.dataset
        model.eval()
        try:
            for image in self.images:
                data = dataset[image] if isinstance(image, int) else dataset.pipeline(dict(img_path=image, img_id=0))
                scene = see(model, data, self.score_thr)
                if not scene.recording.empty:
                    for name, figure in drawing.figures(scene, self.layers, self.last):
                        runner.visualizer.add_image(name, drawing.rendered(figure), step=runner.iter + 1)
                elif not self._warned:
                    self._warned = True
                    runner.logger.warning("DeformOffsetVisHook: the model runs no deformable layers")
        finally:
            model.train()


def register_offset_vis_hook() -> None:
    HOOKS.register_module(module=DeformOffsetVisHook, force=True)
