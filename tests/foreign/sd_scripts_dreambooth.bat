@echo off
set MODEL=.\models\v1-5-pruned.safetensors
accelerate launch --num_cpu_threads_per_process=1 train_db.py ^
  --pretrained_model_name_or_path="%MODEL%" ^
  --train_data_dir=./data/dog --reg_data_dir=./data/dog_class ^
  --output_dir=./output --output_name=dog ^
  --resolution=512 --prior_loss_weight=1.0 --train_batch_size=2 ^
  --learning_rate=1e-6 --lr_scheduler=constant --max_train_steps=800 ^
  --optimizer_type=AdamW8bit --xformers --mixed_precision=fp16 --cache_latents ^
  --gradient_checkpointing --save_every_n_epochs=1 --save_model_as=safetensors --seed=7
